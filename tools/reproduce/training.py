"""Train one network by one method to its end, by the schedule of section 3."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sffx
from tools.precision import precision
from tools.reproduce.data import Images, Split, in_order, save, shuffled
from tools.reproduce.experiments import Experiment
from tools.reproduce.methods import METHODS
from tools.reproduce.networks import build, example, transfer
from tools.reproduce.readouts import accuracy, block_losses, judged, probed, readouts
from tools.reproduce.sameness import refuse, require_same

EVALUATION_BATCH = 500
SAVE_EVERY = 30  # seconds


@dataclass(frozen=True)
class Setting:
    """The values of a search.

    Attributes:
        lr: learning rate of the features.
        classifier_lr: of the classifier.
        weight_decay: AdamW's.
        strength: of the method's recipe; None where it has none.
    """

    lr: float
    classifier_lr: float
    weight_decay: float
    strength: float | None = None


def _do_nothing(epoch: int, accuracy: float) -> None:
    pass


class Run:
    """One training: an experiment, a method, a setting and a seed, from scratch or from weights."""

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        setting: Setting,
        seed: int,
        split: Split,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.experiment = experiment
        self.method_name = name
        self.method = METHODS[name].at(setting.strength)
        self.setting = setting
        self.seed = seed
        self.split = split
        self.net = self._network(weights).to(memory_format=torch.channels_last)
        groups = self.method.groups(self.net, setting.lr, setting.classifier_lr)
        self.schedule = self.method.schedule(self.net)
        self.recipe = experiment.recipe(name)
        self.optimizer = self._optimizer(groups)
        self.names = [group["name"] for group in groups]
        self.first_rates = self._first_rates(groups)
        self.plateau = sffx.BlockPlateau(self.optimizer, patience=experiment.patience)
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"accuracy": -1.0, "epoch": -1, "state": None}

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rates: dict[str, Any] = {"lr": self.setting.lr, "weight_decay": self.setting.weight_decay}
        name = "AdamW" if self.recipe is None else self.recipe.optimizer
        if name == "SGD":
            assert self.recipe is not None
            return torch.optim.SGD(groups, momentum=self.recipe.momentum, **rates)
        kind = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[name]
        # One kernel for a whole step takes a ninth of its time on a CPU.
        return kind(groups, fused=True, **rates)

    def _network(self, weights: Mapping[str, Tensor] | None) -> nn.Module:
        experiment = self.experiment
        classes = int(self.split.test.y.max()) + 1
        model = build(experiment.network, classes, experiment.size, experiment.momentum)
        if weights is not None:
            transfer(model, weights)
        shape = example(experiment.size, experiment.channels)
        return self.method.prepare(model, experiment.policy, shape)

    @property
    def skips(self) -> int:
        """How many of the first blocks the ensemble leaves out."""
        plan = getattr(self.net, "plan", None)
        return 0 if plan is None else plan.objective.skips

    def train(
        self,
        epochs: int,
        path: Path | None = None,
        each: Callable[[int, float], None] = _do_nothing,
    ) -> None:
        """Train to the given epoch or until nothing improves.

        Args:
            epochs: the last epoch.
            path: of the checkpoint. It is written now and then, and an interrupted run goes on from
                it. None keeps none.
            each: gets each epoch and its validation accuracy, and may raise.
        """
        if path is not None and path.exists():
            state = torch.load(path, weights_only=False)
            self._require_same(state, path)
            self.load_state_dict(state)
        if self.schedule is not None:
            epochs = min(epochs, self.schedule.epochs)
        saved = time.monotonic()
        # Of a run that has diverged, the best weights so far stay.
        while len(self.curve) < epochs and not (self._has_stalled or self._has_diverged):
            each(len(self.curve), self._epoch())
            if path is not None and time.monotonic() - saved > SAVE_EVERY:
                self.save(path)
                saved = time.monotonic()
        if path is not None:
            self.save(path)

    @property
    def _has_stalled(self) -> bool:
        return self.recipe is None and len(self.curve) - self.best["epoch"] > self.experiment.stop

    @property
    def _has_diverged(self) -> bool:
        return bool(self.curve) and not math.isfinite(self.curve[-1]["train_loss"])

    def _epoch(self) -> float:
        """Train and validate for one epoch, and return the validation accuracy."""
        epoch = len(self.curve)
        self.method.begin_epoch(self.net, epoch, self.experiment.epochs, self.split)
        start = time.perf_counter()
        train_loss = self._train_epoch(epoch)
        seconds = time.perf_counter() - start
        labels = self.split.validation.y
        scores = self.scores(self.split.validation)
        losses = block_losses(scores, labels)
        if self.recipe is None:
            self.plateau.step(self._loss_of_groups(losses))
        validation = accuracy(judged(scores, self.method.readout, self.skips), labels)
        # By a schedule, later blocks are not trained in earlier epochs: the last epoch counts.
        if self.schedule is not None or validation > self.best["accuracy"]:
            state = copy.deepcopy(self.net.state_dict())
            self.best = {"accuracy": validation, "epoch": epoch, "state": state}
        self.curve.append(
            {
                "train_loss": train_loss,
                "validation": validation,
                "blocks": [accuracy(s, labels) for s in scores],
                "losses": losses,
                "lr": [group["lr"] for group in self.optimizer.param_groups],
                "seconds": seconds,
            }
        )
        return validation

    def _first_rates(self, groups: list[dict[str, Any]]) -> list[float]:
        if self.recipe is None:
            return [group["lr"] for group in groups]
        return [self.recipe.first_rate(i, group["lr"]) for i, group in enumerate(groups)]

    def _set_rates(self, epoch: int, step: int, steps: int) -> None:
        """Set the learning rates of a recipe before a step, which is 0 for the first of an epoch.

        Without a recipe the rates follow the losses, epoch by epoch.
        """
        if self.recipe is None:
            return
        groups = zip(self.optimizer.param_groups, self.first_rates, strict=True)
        for i, (group, first) in enumerate(groups):
            begin = 0 if self.schedule is None else self.schedule.spans[group["name"]].start
            learnt = max(epoch - begin, 0) * steps + step
            factor = self.recipe.factor(i, epoch, self.experiment.epochs, learnt)
            group["lr"] = first * factor

    def _train_epoch(self, epoch: int) -> float:
        """Train on all images once, and return the mean loss."""
        self.net.train()
        blocks = None if self.schedule is None else self.schedule.learning(epoch)
        total = 0.0
        seen = 0
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        batches = shuffled(
            self.split.train,
            self.experiment.batch,
            generator,
            flip=self.experiment.flip,
            shift=self.experiment.shift,
        )
        steps = math.ceil(len(self.split.train) / self.experiment.batch)
        for step, (x, y) in enumerate(batches):
            self._set_rates(epoch, step, steps)
            self.optimizer.zero_grad()
            with precision(self.experiment.precision):
                loss = self.method.loss(self.net, self.split.scaled(x), y, blocks)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(y)
            seen += len(y)
        return total / seen

    def _loss_of_groups(self, losses: list[float]) -> dict[str, float]:
        """Return the validation loss that each parameter group follows.

        With heads each group follows its own block's. Without heads both groups follow the one
        loss. A classifier that does not learn has no group.
        """
        if not self.method.heads:
            return dict.fromkeys(self.names, losses[0])
        plan: Any = self.net.plan
        names = [block.target for block in plan.all_blocks]
        return dict(zip(names, losses, strict=True))

    def scores(self, images: Images) -> Tensor:
        batches = (self.split.scaled(x) for x, _ in in_order(images, EVALUATION_BATCH))
        with precision(self.experiment.precision):
            return self.method.scores(self.net, batches).float()

    def result(self) -> dict[str, Any]:
        """Test the weights of the epoch with the best validation accuracy; by a schedule, the last.

        The network is left with these weights.
        """
        self.net.load_state_dict(self.best["state"])
        validation = self.scores(self.split.validation)
        test = self.scores(self.split.test)
        validation_labels = self.split.validation.y
        test_labels = self.split.test.y
        on_validation = readouts(validation, validation, validation_labels, self.skips)
        on_test = readouts(test, validation, validation_labels, self.skips)
        recipe = self.method.probe
        if recipe is not None:
            for readout, last in (("linear probe", False), ("probe of the last", True)):
                probe = probed(self.net, self.split, self.seed, recipe, last=last)
                on_validation[readout] = probe(self.split.validation)
                on_test[readout] = probe(self.split.test)
        return {
            "setting": asdict(self.setting),
            "seed": self.seed,
            "epochs": len(self.curve),
            "best_epoch": self.best["epoch"] + 1,
            "diverged": self._has_diverged,
            "validation": {
                name: accuracy(s, validation_labels) for name, s in on_validation.items()
            },
            "test": {name: accuracy(s, test_labels) for name, s in on_test.items()},
            "blocks": [accuracy(s, test_labels) for s in test],
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "curve": self.curve,
        }

    def save(self, path: Path) -> None:
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "curve": self.curve,
            "best": self.best,
            "random": torch.get_rng_state(),
            "config": asdict(self.experiment),
            "setting": asdict(self.setting),
        }
        save(state, path)

    def _require_same(self, state: dict[str, Any], path: Path) -> None:
        """Check that a checkpoint is of this run. Older ones do not say what they are of."""
        if "config" not in state:
            return
        require_same(path, state["config"], self.method_name, self.experiment)
        differences = []
        for key, value in asdict(self.setting).items():
            if state["setting"][key] != value:
                differences.append(f"{key} {state['setting'][key]!r} instead of {value!r}")
        refuse(path, differences)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.curve = state["curve"]
        self.best = state["best"]
        torch.set_rng_state(state["random"])
