"""Train one network by one method from its checkpoint to its end, by the schedule of section 3."""

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
from tools.reproduce.data import Split, in_order, save, shuffled
from tools.reproduce.experiments import Experiment
from tools.reproduce.methods import METHODS
from tools.reproduce.networks import build, example, transfer
from tools.reproduce.readouts import accuracy, block_losses, judged, readouts

EVALUATION_BATCH = 500
SAVE_EVERY = 30  # seconds


@dataclass(frozen=True)
class Setting:
    """What is searched for: the learning rates of features and classifier, and AdamW's weight decay."""

    lr: float
    classifier_lr: float
    weight_decay: float


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
        self.experiment, self.method, self.setting, self.seed, self.split = (
            experiment,
            METHODS[name],
            setting,
            seed,
            split,
        )
        classes = int(split.test.y.max()) + 1
        model = build(experiment.network, classes, experiment.size, experiment.momentum)
        if weights is not None:
            transfer(model, weights)
        self.net = self.method.prepare(model, experiment.policy, example(experiment.size)).to(
            memory_format=torch.channels_last
        )
        groups = self.method.groups(self.net, setting.lr, setting.classifier_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=setting.lr, weight_decay=setting.weight_decay)
        self.names = [group["name"] for group in groups]
        self.plateau = sffx.BlockPlateau(self.optimizer, patience=experiment.patience)
        self.curve: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"accuracy": -1.0, "epoch": -1, "state": None}

    def train(
        self,
        epochs: int,
        path: Path | None = None,
        each: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        """Train to the given epoch or until nothing improves; `each` gets the epoch and its validation accuracy, and may raise.

        Args:
            epochs: the last epoch.
            path: of the checkpoint, which is written now and then and from which an interrupted run goes on. None keeps none.
        """
        if path is not None and path.exists():
            self.load_state_dict(torch.load(path, weights_only=False))
        saved = time.monotonic()
        while (
            len(self.curve) < epochs
            and len(self.curve) - self.best["epoch"] <= self.experiment.stop
        ):
            each(len(self.curve), self._epoch())
            if not math.isfinite(self.curve[-1]["train_loss"]):
                break  # what was best before stays
            if path is not None and time.monotonic() - saved > SAVE_EVERY:
                self.save(path)
                saved = time.monotonic()
        if path is not None:
            self.save(path)

    def _epoch(self) -> float:
        epoch, start = len(self.curve), time.perf_counter()
        self.net.train()
        total, seen = 0.0, 0
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        for x, y in shuffled(
            self.split.train, self.experiment.batch, generator, flip=self.experiment.flip
        ):
            self.optimizer.zero_grad()
            loss = self.method.loss(self.net, self.split.scaled(x), y)
            loss.backward()
            self.optimizer.step()
            total, seen = total + loss.item() * len(y), seen + len(y)
        seconds = time.perf_counter() - start
        y = self.split.validation.y
        scores = self.scores(self.split.validation)
        losses = block_losses(scores, y)
        # Without heads both groups follow the one loss; with them each group follows its own.
        self.plateau.step(
            dict(
                zip(
                    self.names,
                    losses if len(losses) == len(self.names) else losses * len(self.names),
                    strict=True,
                )
            )
        )
        found = accuracy(judged(scores, self.method.readout), y)
        if found > self.best["accuracy"]:
            self.best = {
                "accuracy": found,
                "epoch": epoch,
                "state": copy.deepcopy(self.net.state_dict()),
            }
        self.curve.append(
            {
                "train_loss": total / seen,
                "validation": found,
                "blocks": [accuracy(s, y) for s in scores],
                "losses": losses,
                "lr": [group["lr"] for group in self.optimizer.param_groups],
                "seconds": seconds,
            }
        )
        return found

    def scores(self, images: Any) -> Tensor:
        return self.method.scores(
            self.net, (self.split.scaled(x) for x, _ in in_order(images, EVALUATION_BATCH))
        )

    def result(self) -> dict[str, Any]:
        """Test the weights of the epoch with the best validation accuracy; leaves the network with them."""
        self.net.load_state_dict(self.best["state"])
        validation, test, y, v = (
            self.scores(self.split.validation),
            self.scores(self.split.test),
            self.split.test.y,
            self.split.validation.y,
        )
        return {
            "setting": asdict(self.setting),
            "seed": self.seed,
            "epochs": len(self.curve),
            "best_epoch": self.best["epoch"] + 1,
            "diverged": not math.isfinite(self.curve[-1]["train_loss"]),
            "validation": {
                name: accuracy(s, v) for name, s in readouts(validation, validation, v).items()
            },
            "test": {name: accuracy(s, y) for name, s in readouts(test, validation, v).items()},
            "blocks": [accuracy(s, y) for s in test],
            "parameters": parameters(self.net),
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
        }
        save(state, path)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        self.curve, self.best = state["curve"], state["best"]
        torch.set_rng_state(state["random"])


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
