"""One run: a method, a learning rate, a seed. A run that was interrupted goes on."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sffx
from sffx.files import writing
from sffx.net import cut_model
from sffx.runtime.modes import evaluating
from tools.precision import precision
from tools.tasks.data import Data, Part
from tools.tasks.experiments import Experiment, Method, plain_scores

WEIGHT_DECAY = 1e-2


@dataclass
class Run:
    """A training run.

    Attributes:
        experiment: of which it is a run.
        method: that trains.
        lr: the largest learning rate; it falls to zero along a cosine.
        seed: of weights and order.
        epochs: how many.
        data: to train and to judge with.
    """

    experiment: Experiment
    method: Method
    lr: float
    seed: int
    epochs: int
    data: Data

    def train(self, checkpoint: Path, *, tested: bool = True) -> dict[str, Any]:
        """Train to the end, and return the best epoch by validation.

        Args:
            checkpoint: holds the state after each epoch, and the weights of the best one.
            tested: whether that epoch is tested as well.
        """
        torch.manual_seed(self.seed)
        task = self.experiment.task
        example = self.data.train.x[:2]
        net = self.method.net(self.experiment.build(), task, self.experiment.policy, example)
        if self.experiment.image_size:
            # A CPU convolves a quarter faster.
            net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(self._groups(net), weight_decay=WEIGHT_DECAY)
        state: dict[str, Any] = {"epoch": 0, "best": None, "weights": None}
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(state["epoch"], self.epochs):
            self._epoch(net, optimizer, epoch)
            state |= self._judged(net, state["best"], epoch)
            state |= {"epoch": epoch + 1}
            whole = {**state, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            with writing(checkpoint) as file:
                torch.save(whole, file)
        best = state["best"]
        if not tested:
            return best
        net.load_state_dict(state["weights"])
        test = self._metrics(net, self.data.test)
        readouts = test[self.experiment.metric]
        return {**best, "test": readouts[best["readout"]], "test_by_metric": test}

    def _groups(self, net: nn.Module) -> Any:
        if self.method.kind == "BP":
            return [{"params": list(net.parameters()), "lr": self.lr}]
        return sffx.parameter_groups(cut_model(net), self.lr)

    def _epoch(self, net: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        # The randomness of an epoch depends on the seed and its number alone.
        torch.manual_seed(1000 * self.seed + epoch)
        net.train()
        batch = self.experiment.batch
        steps = math.ceil(len(self.data.train) / batch)
        order = 1000 * self.seed + epoch
        batches = self.data.train.shuffled(batch, order, flip=self.experiment.flip)
        for step, (x, y) in enumerate(batches):
            # BN has no variance from one small map.
            if len(x) == 1:
                continue
            progress = (epoch * steps + step) / (self.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * progress)) / 2
            optimizer.zero_grad()
            with precision(self.experiment.precision):
                loss = self.method.loss(net, self.experiment.task, x, y)
            loss.backward()
            optimizer.step()

    def _judged(self, net: nn.Module, best: Any, epoch: int) -> dict[str, Any]:
        """Return this epoch and its weights, {} if it is no better than the best one so far."""
        validation = self._metrics(net, self.data.validation)[self.experiment.metric]
        chosen = None
        value = self.experiment.worst if best is None else best["validation"]
        for name, own in validation.items():
            is_readout = not name.startswith("block_")
            if is_readout and self.experiment.better(own, value):
                chosen, value = name, own
        if chosen is None and best is not None:
            return {}
        # The first epoch is kept even if it diverged, so that there is a best one.
        found = {"epoch": epoch + 1, "readout": chosen or "classifier", "validation": value}
        return {"best": found, "weights": copy.deepcopy(net.state_dict())}

    def _metrics(self, net: nn.Module, part: Part) -> dict[str, dict[str, float]]:
        """Return the metrics of each readout, by the metric's name."""
        batches = list(part.batches(self.experiment.batch))
        with precision(self.experiment.precision):
            if self.method.kind == "BP":
                return self._metrics_of_model(net, batches)
            evaluation = sffx.evaluate(net, batches)
        return {**evaluation.metrics, "loss": evaluation.loss}

    def _metrics_of_model(self, model: nn.Module, batches: Any) -> dict[str, dict[str, float]]:
        task = self.experiment.task
        total: dict[str, torch.Tensor] = {}
        with evaluating(model), torch.no_grad():
            for x, y in batches:
                for name, value in task.sums(plain_scores(model, x), y).items():
                    total[name] = total.get(name, torch.zeros(())) + value.double()
        return {name: {"classifier": value} for name, value in task.metrics(total).items()}
