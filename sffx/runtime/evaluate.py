"""Evaluate a cut model: accuracy and loss, or the task's metrics, of every block and readout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from sffx.errors import InputError, ProcessError
from sffx.inputs import batch_size, batches, bind, split_batch, targets_of
from sffx.kernels.precision import widened
from sffx.learning.losses import explaining_loss
from sffx.learning.readouts import every_mode, readout_of
from sffx.net import cut_model, plan_of
from sffx.parts import CLASSIFIER
from sffx.runtime.agreement import require_processes
from sffx.runtime.find_residency import residency_of
from sffx.runtime.modes import evaluating
from sffx.runtime.walk import walk
from sffx.tables import Column, html_table, text_table
from sffx.tasks import CLASSIFICATION, Sums, Task


@dataclass(frozen=True)
class Evaluation:
    """The metrics of each block and each readout, by name. Prints as a table.

    The names are "block_0", ..., "ensemble", "weighted" where blocks were weighed, "last" and
    "classifier".

    Attributes:
        accuracy: the share of samples whose highest score is their label's, between 0 and 1. The
            paper's "layers accuracy" is that of the ensemble, its "head accuracy" that of the
            classifier. For pixels and tokens it is the share of these, for several labels the
            share of labels. Empty for numbers.
        loss: the mean of the task's loss; for classes cross-entropy with the scores as logits, in
            nats.
        samples: how many samples were seen.
        metrics: the task's other metrics, by the name of the metric and then of the readout, as
            `metrics["mean_iou"]["ensemble"]`. Empty for classes of a sample.
        by_class: the task's metric of each class, label or number, in order: IoU of pixels, F1 of
            several labels, R2 of numbers. Empty for other tasks.
        task: what was predicted.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    samples: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    by_class: dict[str, tuple[float, ...]] = field(default_factory=dict)
    task: Task = CLASSIFICATION

    def __str__(self) -> str:
        return text_table(self._columns(), self._rows(), note=f"({self.samples} samples)")

    def _repr_html_(self) -> str:
        """Return the same table for a notebook."""
        return html_table(self._columns(), self._rows(), caption=f"{self.samples} samples")

    def _all_metrics(self) -> dict[str, dict[str, float]]:
        accuracy = {"accuracy": self.accuracy} if self.accuracy else {}
        return {**accuracy, **self.metrics, "loss": self.loss}

    def _columns(self) -> list[Column]:
        columns = [Column("", align="left")]
        for metric in self._all_metrics():
            title = metric.replace("_", " ")
            columns.append(Column(title, width=8) if metric == "loss" else Column(title))
        return columns

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for name in self.loss:
            cells = [name]
            for metric, values in self._all_metrics().items():
                is_share = metric in self.task.shares
                cells.append(f"{values[name]:.2%}" if is_share else f"{values[name]:.4f}")
            rows.append(tuple(cells))
        return rows


@torch.no_grad()
def evaluate(
    net: nn.Module, loader: Iterable[Any], *, group: dist.ProcessGroup | None = None
) -> Evaluation:
    """Return accuracy and loss, or the task's metrics, of each block and each readout.

    The model runs in eval mode. Afterwards its mode is as before.

    Args:
        net: what `transform` returned, also inside a wrapper such as `AveragedModel`.
        loader: yields (x, y), x as `net` takes it and y class indices, (B,), or the targets of
            another task. Both are moved to the model's device.
        group: processes whose samples are counted together; `torch.distributed.group.WORLD` for
            all. Each must call this with a loader of its own, which may have any number of samples;
            of a sharded net, as many batches in each. If None, this process counts its own alone.

    Raises:
        InputError: `net` is no cut model, the loader is empty or yields something else, or labels
            are out of range.
        ProcessError: the evaluation failed in another process of the group, or a replicated net
            has made more or fewer steps there.
    """
    cut = cut_model(net)
    if group is not None:
        return _evaluate_together(cut, loader, group)
    totals = Totals(cut)
    totals.add_all(cut, loader)
    return totals.evaluation()


def block_scores(net: fx.GraphModule, x: Any) -> Any:
    """Return the scores of every block for a batch, in the model's present mode, (K, B, J).

    The scores are the goodness of each feature block; the classifier's logits come last, and K
    counts it. For another task than classification they are a tuple, as the net itself returns in
    train mode. In train mode they are a tuple as well where the heads of an objective give
    something else than (B, J).

    Args:
        net: what `transform` returned.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the
            model has several.

    Raises:
        InputError: `net` is no cut model, or cannot run on x, which is unlike the input that it was
            cut for.
    """
    plan = plan_of(net)
    tries = 1 if net.training else plan.objective.tries(plan.num_classes)
    if tries == 1:
        return _block_scores(net, x)
    scores = [_block_scores(net, part) for part in _split_input(bind(plan, x), tries)]
    # Such an objective has classes of a sample, whose scores are (K, B, J).
    return torch.cat(scores, dim=1)


def _split_input(inputs: dict[str, Any], tries: int) -> Iterator[dict[str, Any]]:
    """Yield the inputs, a few samples at a time.

    A prediction runs each sample several times. A part has so few samples that it gets about as
    many rows as the whole batch has, and needs no more memory.

    Args:
        inputs: by name.
        tries: rows for each sample.
    """
    samples = batch_size(inputs)
    size = max(samples // tries, 1)
    # A batch without samples is one part, whose scores have no rows.
    for start in range(0, max(samples, 1), size):
        yield {name: value[start : start + size] for name, value in inputs.items()}


def _block_scores(net: fx.GraphModule, x: Any) -> Any:
    residency = residency_of(net)
    residency.scoring()
    all_scores = []
    for stage, scores in walk(net, x):
        all_scores.append(widened(scores))
        residency.release(stage, changed=False)
    return plan_of(net).task.gathered(all_scores)


def scores_by_name(net: fx.GraphModule, scores: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the scores of each block and each readout, (B, J) each, in the order of a table.

    Args:
        net: what `transform` returned.
        scores: of its blocks, as `block_scores` returns them.
    """
    plan = plan_of(net)
    aligned = plan.task.aligned(scores)
    names = [block.target for block in plan]
    blocks = dict(zip(names, aligned[:-1], strict=True))
    readout = readout_of(net)
    by_mode = every_mode(aligned, readout.weights, plan.task, readout.skips)
    if not plan.objective.trains_classifier:
        # Its scores would be those of weights that nobody has trained.
        del by_mode[CLASSIFIER]
    return {**blocks, **by_mode}


def scored(
    net: fx.GraphModule, loader: Iterable[Any], *, may_be_empty: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """Yield the scores of every block, (K, B, J), and the labels, (B,), of each batch.

    For another task than classification these are what `block_scores` returns, and its targets.

    Both are on the model's device.

    Args:
        net: what `transform` returned.
        loader: as for `evaluate`.
        may_be_empty: whether the loader may be empty.

    Raises:
        InputError: the loader is empty or yields something else than pairs, or labels are out of
            range.
    """
    plan = plan_of(net)
    device = residency_of(net).device
    samples = 0
    for batch in batches(loader):
        x, y = split_batch(batch, device)
        scores = block_scores(net, x)
        # After the scores, which tell the number of samples.
        plan.task.check_labels(y, len(scores[-1]), plan.num_classes)
        samples += len(y)
        yield scores, targets_of(plan, x, y)
    if not samples and not may_be_empty:
        raise InputError("the loader yielded no samples. Hint: pass data to evaluate on")


def _evaluate_together(
    net: fx.GraphModule, loader: Iterable[Any], group: dist.ProcessGroup
) -> Evaluation:
    """Evaluate a model on the samples of all processes of a group."""
    require_processes(group)
    residency = residency_of(net)
    residency.agree("evaluate")
    totals = Totals(net)
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
        raise InputError(
            "the loaders of all processes yielded no samples. Hint: pass data to evaluate on"
        )
    return totals.evaluation()


class Totals:
    """The sums of an evaluation over the batches so far, by name."""

    def __init__(self, net: fx.GraphModule) -> None:
        self.task = plan_of(net).task
        self.samples = 0
        # Known before there are samples, since a process of a group may have none.
        self.sums = _no_sums(net)

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
        # Each process sets an entry of its own.
        own_failure = torch.zeros(dist.get_world_size(group), dtype=torch.float64)
        own_failure[dist.get_rank(group)] = float(failed)
        # Integers up to 2^53 are exact in float64.
        own_samples = torch.tensor([self.samples], dtype=torch.float64)
        own = [own_failure, own_samples, _flat(self.sums)]
        total = torch.cat(own).to(device)
        dist.all_reduce(total, group=group)
        failures, samples, sums = total.cpu().split([len(part) for part in own])
        self.samples = int(samples)
        self.sums = _unflattened(sums, self.sums)
        ranks = dist.get_process_group_ranks(group)
        failed_ranks = []
        for rank, has_failed in zip(ranks, failures.tolist(), strict=True):
            if has_failed:
                failed_ranks.append(rank)
        return failed_ranks

    def add(self, scores: dict[str, Tensor], y: Tensor) -> None:
        """Count one batch."""
        self.samples += len(y)
        of_batch = {}
        for name, own in scores.items():
            with explaining_loss(name, own, y):
                of_batch[name] = self.task.sums(own, y)
        # One transfer for all names, because on a GPU each transfer waits for the device.
        self._add_sums(_unflattened(_flat(of_batch).cpu(), of_batch))

    def merge(self, other: Totals) -> None:
        """Add the sums of another part of the samples, such as those of another process."""
        self.samples += other.samples
        self._add_sums(other.sums)

    def _add_sums(self, by_name: dict[str, Sums]) -> None:
        for name, sums in by_name.items():
            own = self.sums[name]
            for key, value in sums.items():
                own[key] = own[key] + value

    def evaluation(self) -> Evaluation:
        """Return the metrics."""
        by_metric: dict[str, dict[str, float]] = {}
        by_class: dict[str, tuple[float, ...]] = {}
        for name, sums in self.sums.items():
            for metric, value in self.task.metrics(sums).items():
                by_metric.setdefault(metric, {})[name] = value
            of_classes = self.task.by_class(sums)
            if of_classes:
                by_class[name] = of_classes
        accuracy = by_metric.pop("accuracy", {})
        loss = by_metric.pop("loss")
        return Evaluation(accuracy, loss, self.samples, by_metric, by_class, self.task)


def _no_sums(net: fx.GraphModule) -> dict[str, Sums]:
    """Return the sums of no samples, of each block and each readout."""
    plan = plan_of(net)
    output = (1, *plan.classifier.shape)
    none: dict[str, Sums] = {}
    # The sums of batches come to the CPU, whatever the default device is.
    with torch.device("cpu"):
        any_scores = plan.task.gathered([torch.zeros(output)] * len(plan.all_blocks))
        targets = plan.task.example_targets(output)
        for name, scores in scores_by_name(net, any_scores).items():
            none[name] = {}
            for key, value in plan.task.sums(scores, targets).items():
                none[name][key] = torch.zeros_like(value).double()
    return none


def _every_sum(by_name: dict[str, Sums]) -> list[Tensor]:
    """Return all sums in the order in which `_flat` lays them out."""
    every_sum: list[Tensor] = []
    for sums in by_name.values():
        every_sum += sums.values()
    return every_sum


def _flat(by_name: dict[str, Sums]) -> Tensor:
    """Return all sums, one behind the other, in float64."""
    return torch.cat([value.flatten().double() for value in _every_sum(by_name)])


def _unflattened(flat: Tensor, like: dict[str, Sums]) -> dict[str, Sums]:
    """Return sums by name again, from those that `_flat` has laid out.

    Args:
        flat: the sums.
        like: have their names and shapes.
    """
    sizes = [value.numel() for value in _every_sum(like)]
    parts = iter(flat.split(sizes))
    by_name: dict[str, Sums] = {}
    for name, sums in like.items():
        by_name[name] = {}
        for key, value in sums.items():
            by_name[name][key] = next(parts).reshape(value.shape)
    return by_name
