"""Evaluate a cut model: accuracy and loss of every block and of every readout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.errors import InputError
from sffx.inputs import batches, split_batch
from sffx.kernels.precision import widened
from sffx.learning.losses import check_labels
from sffx.learning.readouts import every_mode, readout_of
from sffx.net import cut_model, plan_of
from sffx.runtime.find_residency import residency_of
from sffx.runtime.modes import evaluating
from sffx.runtime.walk import walk
from sffx.tables import Column, html_table, text_table

_COLUMNS = (Column("", align="left"), Column("accuracy"), Column("loss", width=8))


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss of each block and each readout, by name. Prints as a table.

    The names are "block_0", ..., "ensemble", "weighted" where blocks were weighed, "last" and
    "classifier".

    Attributes:
        accuracy: the share of samples whose highest score is their label's, between 0 and 1. The
            paper's "layers accuracy" is that of the ensemble, its "head accuracy" that of the
            classifier.
        loss: the mean cross-entropy with the scores as logits, in nats.
        samples: how many samples were seen.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    samples: int

    def __str__(self) -> str:
        return text_table(_COLUMNS, self._rows(), note=f"({self.samples} samples)")

    def _repr_html_(self) -> str:
        """Return the same table for a notebook."""
        return html_table(_COLUMNS, self._rows(), caption=f"{self.samples} samples")

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for name, accuracy in self.accuracy.items():
            rows.append((name, f"{accuracy:.2%}", f"{self.loss[name]:.4f}"))
        return rows


@torch.no_grad()
def evaluate(net: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Evaluate the cut model in eval mode; afterwards its mode is as before.

    Args:
        net: what `transform` returned, also inside a wrapper such as `AveragedModel`.
        loader: yields (x, y), x as `net` takes it and y class indices, (B,). Both are moved to the
            model's device.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, or labels
            are out of range.
    """
    cut = cut_model(net)
    totals = _Totals()
    with evaluating(cut):
        for scores, y in scored(cut, loader):
            totals.add(scores_by_name(cut, scores), y)
    return totals.evaluation()


def block_scores(net: fx.GraphModule, x: Any) -> Tensor:
    """Return the scores of every block for a batch, in the model's present mode, (K, B, J).

    The scores are the goodness of each feature block; the classifier's logits come last.

    Args:
        net: what `transform` returned.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the
            model has several.

    Raises:
        InputError: the model cannot run on x, and x is not like the input that it was cut for.
    """
    residency = residency_of(net)
    all_scores = []
    for stage, scores in walk(net, x):
        all_scores.append(widened(scores))
        residency.release(stage, changed=False)
    return torch.stack(all_scores)


def scores_by_name(net: fx.GraphModule, scores: Tensor) -> dict[str, Tensor]:
    """Return the scores of each block and each readout, (B, J) each, in the order of a table.

    Args:
        net: what `transform` returned.
        scores: of its blocks, as `block_scores` returns them.
    """
    names = [block.target for block in plan_of(net)]
    blocks = dict(zip(names, scores[:-1], strict=True))
    return {**blocks, **every_mode(scores, readout_of(net).weights)}


def scored(net: fx.GraphModule, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scores of every block, (K, B, J), and the labels, (B,), of each batch.

    Both are on the model's device.

    Raises:
        InputError: the loader is empty or yields something else than pairs, or labels are out of
            range.
    """
    device = residency_of(net).device
    samples = 0
    for batch in batches(loader):
        x, y = split_batch(batch, device)
        scores = block_scores(net, x)
        # After the scores, which tell the number of samples and classes.
        check_labels(y, scores.shape[1], scores.shape[2])
        samples += len(y)
        yield scores, y
    if not samples:
        raise InputError("the loader yielded no samples")


class _Totals:
    """The sums of an evaluation over the batches so far, by name."""

    def __init__(self) -> None:
        self.samples = 0
        self.correct: dict[str, int] = {}
        self.loss: dict[str, float] = {}

    def add(self, scores: dict[str, Tensor], y: Tensor) -> None:
        """Count one batch."""
        self.samples += len(y)
        corrects = []
        losses = []
        for own in scores.values():
            is_correct = own.argmax(dim=1) == y
            corrects.append(is_correct.sum())
            losses.append(F.cross_entropy(own, y, reduction="sum"))
        # One transfer for all names, because on a GPU each transfer waits for the device.
        correct_counts = torch.stack(corrects).tolist()
        loss_sums = torch.stack(losses).tolist()
        for name, correct, loss in zip(scores, correct_counts, loss_sums, strict=True):
            self.correct[name] = self.correct.get(name, 0) + correct
            self.loss[name] = self.loss.get(name, 0.0) + loss

    def evaluation(self) -> Evaluation:
        """Return accuracies and mean losses."""
        accuracy = {name: right / self.samples for name, right in self.correct.items()}
        loss = {name: total / self.samples for name, total in self.loss.items()}
        return Evaluation(accuracy, loss, self.samples)
