"""Evaluate a cut model: accuracy and loss of every block and of every readout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.errors import InputError, ProcessError
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
def evaluate(
    net: nn.Module, loader: Iterable[Any], *, group: dist.ProcessGroup | None = None
) -> Evaluation:
    """Evaluate the cut model in eval mode; afterwards its mode is as before.

    Args:
        net: what `transform` returned, also inside a wrapper such as `AveragedModel`.
        loader: yields (x, y), x as `net` takes it and y class indices, (B,). Both are moved to the
            model's device.
        group: processes whose samples are counted together; `torch.distributed.group.WORLD` for
            all. Each must call this with a loader of its own, which may have any number of samples.
            If None, this process counts its own samples alone.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, or labels
            are out of range.
        ProcessError: the evaluation failed in another process of the group, or a replicated net
            has made more or fewer steps there.
    """
    cut = cut_model(net)
    if group is not None:
        return _evaluate_together(cut, loader, group)
    totals = _Totals(cut)
    totals.add_all(cut, loader)
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


def scored(
    net: fx.GraphModule, loader: Iterable[Any], *, may_be_empty: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the scores of every block, (K, B, J), and the labels, (B,), of each batch.

    Both are on the model's device.

    Args:
        net: what `transform` returned.
        loader: as for `evaluate`.
        may_be_empty: whether the loader may be empty.

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
    if not samples and not may_be_empty:
        raise InputError("the loader yielded no samples")


def _evaluate_together(
    net: fx.GraphModule, loader: Iterable[Any], group: dist.ProcessGroup
) -> Evaluation:
    """Evaluate a model on the samples of all processes of a group."""
    residency = residency_of(net)
    residency.agree("evaluate")
    totals = _Totals(net)
    failure: Exception | None = None
    try:
        totals.add_all(net, loader, may_be_empty=True)
    except Exception as error:
        # The others wait for this process, so it takes part before it raises.
        failure = error
    failed = totals.add_up(group, residency.device, failed=failure is not None)
    if failure is not None:
        raise failure
    if failed:
        ranks = ", ".join(map(str, failed))
        raise ProcessError(f"the evaluation failed on rank {ranks}. Hint: its message says why")
    if not totals.samples:
        raise InputError("the loaders of all processes yielded no samples")
    return totals.evaluation()


class _Totals:
    """The sums of an evaluation over the batches so far, by name."""

    def __init__(self, net: fx.GraphModule) -> None:
        plan = plan_of(net)
        # Known before there are samples, since a process of a group may have none.
        any_scores = torch.zeros(len(plan.all_blocks), 1, plan.num_classes)
        names = scores_by_name(net, any_scores)
        self.samples = 0
        self.correct = dict.fromkeys(names, 0)
        self.loss = dict.fromkeys(names, 0.0)

    def add_all(
        self, net: fx.GraphModule, loader: Iterable[Any], *, may_be_empty: bool = False
    ) -> None:
        """Count all batches of a loader, in eval mode."""
        with evaluating(net):
            for scores, y in scored(net, loader, may_be_empty=may_be_empty):
                self.add(scores_by_name(net, scores), y)

    def add_up(self, group: dist.ProcessGroup, device: torch.device, *, failed: bool) -> list[int]:
        """Make the sums those of all processes, and return the ranks where the evaluation failed.

        Args:
            group: of the processes.
            device: on which their sums are added.
            failed: whether it failed in this process.
        """
        failures = [0.0] * dist.get_world_size(group)
        failures[dist.get_rank(group)] = float(failed)
        own = [*failures, self.samples, *self.correct.values(), *self.loss.values()]
        # Integers up to 2^53 are exact in float64.
        sums = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=group)
        found = sums.tolist()
        ranks = dist.get_process_group_ranks(group)
        samples = len(ranks)
        names = list(self.correct)
        corrects = samples + 1
        losses = corrects + len(names)
        self.samples = int(found[samples])
        self.correct = dict(zip(names, map(int, found[corrects:losses]), strict=True))
        self.loss = dict(zip(names, found[losses:], strict=True))
        return [rank for rank, each in zip(ranks, found[:samples], strict=True) if each]

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
            self.correct[name] += correct
            self.loss[name] += loss

    def evaluation(self) -> Evaluation:
        """Return accuracies and mean losses."""
        accuracy = {name: right / self.samples for name, right in self.correct.items()}
        loss = {name: total / self.samples for name, total in self.loss.items()}
        return Evaluation(accuracy, loss, self.samples)
