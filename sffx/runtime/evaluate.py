"""Evaluate a cut model: accuracy and loss of every block, the ensemble, the weighted mixture, the last block and the classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.errors import InputError
from sffx.inputs import bind, explaining_input_errors, split_batch
from sffx.learning.losses import check_labels
from sffx.learning.readouts import WEIGHTED, mixture, readout_of
from sffx.net import plan_of
from sffx.runtime.offload import compute_device
from sffx.runtime.shard import reshard


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss by name: "block_0", ..., "ensemble", "weighted" where blocks were weighed, "last", "classifier". Prints as a table.

    Attributes:
        accuracy: the share of samples whose highest score is their label's, between 0 and 1 ("layers accuracy" is that of the ensemble,
            "head accuracy" that of the classifier).
        loss: the mean cross-entropy with the scores as logits, in nats.
        samples: how many samples were seen.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    samples: int

    def __str__(self) -> str:
        width = max(map(len, self.accuracy))
        lines = [f"{'':{width}}  accuracy      loss   ({self.samples} samples)"]
        lines += [
            f"{name:{width}}  {value:8.2%}  {self.loss[name]:8.4f}"
            for name, value in self.accuracy.items()
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same table for a notebook."""
        cells = "".join(
            f"<tr><th>{escape(name)}</th><td>{value:.2%}</td><td>{self.loss[name]:.4f}</td></tr>"
            for name, value in self.accuracy.items()
        )
        head = "<thead><tr><th></th><th>accuracy</th><th>loss</th></tr></thead>"
        return (
            f"<table><caption>{self.samples} samples</caption>{head}<tbody>{cells}</tbody></table>"
        )


def block_scores(net: fx.GraphModule, x: Any) -> Tensor:
    """Return what every block says of a batch in the model's present mode: goodness and the classifier's logits last, (K, B, J).

    Args:
        net: what `transform` returned.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the model has several.

    Raises:
        InputError: the model cannot run on it, and it is not like the input that the model was cut for.
    """
    values = bind(plan_of(net), x)
    with explaining_input_errors(net, values):
        seen = _Scores(net).run(*values.values())
    return torch.stack([scores.float() if scores.dtype.itemsize < 4 else scores for scores in seen])


class _Scores(fx.Interpreter):
    """Runs a cut model up to its readout, and returns what that is given."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.extra_traceback = False

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "readout":
            return args[0]
        value = super().call_module(target, args, kwargs)
        reshard(self.submodules[target])
        return value


@torch.no_grad()
def evaluate(net: fx.GraphModule, loader: Iterable[Any]) -> Evaluation:
    """Evaluate the cut model in eval mode; its mode is as before afterwards.

    Args:
        net: what `transform` returned.
        loader: yields (x, y), x as `net` takes it and y class indices (B,); both are moved to the model's device.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, or labels are out of range.
    """
    plan = plan_of(net)
    with evaluating(net):
        return _evaluation(
            [block.target for block in plan], readout_of(net).weights, scored(net, loader)
        )


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the context; afterwards every module has its own mode again."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def scored(net: fx.GraphModule, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each batch what `block_scores` says of it, (K, B, J), and its labels, (B,), both on the model's device.

    Raises:
        InputError: the loader is empty or yields something else than pairs, or labels are out of range.
    """
    device = compute_device(net)
    empty = True
    for batch in loader:
        x, y = split_batch(batch, device)
        scores = block_scores(net, x)
        check_labels(y, scores.shape[1], scores.shape[2])
        empty = empty and not len(y)
        yield scores, y
    if empty:
        raise InputError("the loader yielded no samples")


def _evaluation(
    blocks: list[str], weights: Sequence[float] | None, batches: Iterable[tuple[Tensor, Tensor]]
) -> Evaluation:
    mixed = [WEIGHTED] if weights is not None else []
    names = [*blocks, "classifier", "ensemble", "last", *mixed]
    correct, loss, samples = (
        torch.zeros(len(names)),
        torch.zeros(len(names), dtype=torch.float64),
        0,
    )
    for scores, y in batches:
        goodness = scores[:-1]
        scores = torch.cat([scores, goodness.mean(dim=0, keepdim=True), goodness[-1:]])
        if weights is not None:
            scores = torch.cat([scores, mixture(goodness, weights)[None]])
        correct += (scores.argmax(dim=2) == y).sum(dim=1).cpu()
        loss += torch.stack([F.cross_entropy(s, y, reduction="sum") for s in scores]).cpu()
        samples += len(y)
    order = [*blocks, "ensemble", *mixed, "last", "classifier"]
    at = {name: i for i, name in enumerate(names)}
    return Evaluation(
        accuracy={name: float(correct[at[name]]) / samples for name in order},
        loss={name: float(loss[at[name]]) / samples for name in order},
        samples=samples,
    )
