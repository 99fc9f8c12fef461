"""Early exit: blocks run one after the other, and a sample stops at the first one that is sure of it.

Local learning gives every block an answer of its own. After each block the answer so far is the mean of the goodness of the blocks up to
it, the ensemble of section 4.3 cut short, and its confidence is the largest entry of that mean's softmax, as in the loss. Samples that
reach the threshold leave the batch, so what follows is not computed for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sffx.errors import InputError
from sffx.export.exit_stage import ExitStage
from sffx.inputs import bind_inputs, like_the_model, random_batch, split_batch
from sffx.learning.losses import check_labels
from sffx.net import plan_of
from sffx.runtime.shard import require_whole
from sffx.runtime.stage import Stage, nodes_read_by, stages_of
from sffx.runtime.walk import walk_attached

NEVER = 2.0  # a threshold that no softmax reaches


@dataclass(frozen=True)
class EarlyScores:
    """What the runner says of a batch.

    Attributes:
        scores: the mean of the goodness of the blocks that a sample went through, (B, J).
        blocks: how many blocks those are, (B,), from 1.
        macs: multiply-adds, the mean over the samples.
    """

    scores: Tensor
    blocks: Tensor
    macs: float


@dataclass(frozen=True)
class ExitPoint:
    """One threshold, and the accuracy and the cost that it gives.

    Attributes:
        threshold: of the confidence; above 1, no sample stops early.
        accuracy: between 0 and 1.
        macs: multiply-adds of a sample, the mean.
        blocks: number of blocks that a sample goes through, the mean.
    """

    threshold: float
    accuracy: float
    macs: float
    blocks: float


@dataclass(frozen=True)
class ExitCurve:
    """Accuracy against compute, from the lowest threshold to none at all. Prints as a table.

    Attributes:
        points: one for each threshold, rising; the last is the whole ensemble.
        samples: how many samples were seen.
    """

    points: tuple[ExitPoint, ...]
    samples: int

    def __str__(self) -> str:
        lines = [f"threshold  accuracy  blocks            MACs   ({self.samples} samples)"]
        for point in self.points:
            threshold = "none" if point.threshold > 1 else f"{point.threshold:.4f}"
            lines.append(
                f"{threshold:>9}  {point.accuracy:8.2%}  {point.blocks:6.2f}  {point.macs:14,.0f}"
            )
        return "\n".join(lines)


class EarlyExit:
    """Runs a cut model block by block and stops, sample by sample, at the first block that is confident.

    The confidence after a block is the softmax maximum of the mean of the goodness so far; the weights of `sffx.weigh` play no part. With a
    threshold above 1 no sample leaves early, and the scores are those of the ensemble, bit by bit. The model is copied as it is and runs in
    eval mode on its device.

    Args:
        net: what `sffx.transform` returned.
        threshold: of the confidence, above 0; `calibrate` chooses one.

    Attributes:
        stages: the feature blocks, in order. The classifier is not among them.

    Raises:
        InputError: `net` is no cut model or is sharded, or `threshold` is not a number above 0.
    """

    def __init__(self, net: fx.GraphModule, threshold: float = 0.9) -> None:
        plan = plan_of(net)
        require_whole(net)
        self.threshold = threshold
        self.inputs = plan.inputs
        # Parameters keep their requires_grad: by it the heads choose their form, which must be the form that `net` itself takes.
        self.stages, self.batched = _exit_stages(copy.deepcopy(net).eval())

    @classmethod
    def load(cls, folder: str | Path, threshold: float | None = None) -> EarlyExit:
        """Return a runner on ONNX Runtime, on what `sffx.export_early_exit` wrote.

        Args:
            folder: that it wrote.
            threshold: the one that was written with it if None.

        Raises:
            InputError: there is no such export in the folder, or it cannot be read.
            MissingExtra: onnxruntime is not installed.
        """
        from sffx.export.stages import load_stages

        runner = cls.__new__(cls)
        runner.stages, runner.inputs, runner.batched, written = load_stages(Path(folder))
        runner.threshold = written if threshold is None else threshold
        return runner

    @property
    def threshold(self) -> float:
        """The confidence at which a sample stops."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        if (
            isinstance(threshold, bool)
            or not isinstance(threshold, (int, float))
            or not threshold > 0
        ):
            raise InputError(
                f"the threshold is {threshold!r}. Hint: pass a number above 0; from above 1 on, no sample stops early"
            )
        self._threshold = float(threshold)

    @torch.no_grad()
    def __call__(self, x: Any) -> EarlyScores:
        """Run the blocks on a batch, each on the samples that the blocks before were not sure of.

        Args:
            x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the model has several.

        Raises:
            InputError: x does not fit the model's inputs.
        """
        values = bind_inputs(self.inputs, x)
        rows = torch.arange(len(next(iter(values.values()))))
        blocks = torch.zeros(len(rows), dtype=torch.int64)
        scores: Tensor | None = None
        goodness: list[Tensor] = []
        for depth, stage_goodness in enumerate(self._goodness(values), start=1):
            goodness.append(stage_goodness)
            mean = torch.stack(goodness).mean(dim=0)
            scores = mean.new_zeros(mean.shape) if scores is None else scores
            sure = (_confidence(mean) >= self.threshold) | (depth == len(self.stages))
            left = rows[sure.cpu()]
            scores[left.to(scores.device)], blocks[left] = mean[sure], depth
            if sure.all():
                break
            if sure.any():
                rows, goodness = rows[~sure.cpu()], [each[~sure] for each in goodness]
                self._keep(~sure, values)
        assert scores is not None  # a plan has at least one block
        return EarlyScores(scores, blocks, self._macs(blocks))

    @torch.no_grad()
    def cumulative(self, x: Any) -> Tensor:
        """Return the mean of the goodness up to each block, (K, B, J), whatever the threshold; the last is the ensemble."""
        values = bind_inputs(self.inputs, x)
        goodness = list(self._goodness(values))
        return torch.stack(
            [torch.stack(goodness[:depth]).mean(dim=0) for depth in range(1, len(goodness) + 1)]
        )

    def curve(self, loader: Iterable[Any], thresholds: Sequence[float] | None = None) -> ExitCurve:
        """Return accuracy against mean multiply-adds for a range of thresholds; the runner's own stays as it is.

        Args:
            loader: yields (x, y), x as the runner takes it and y class indices, (B,): validation data.
            thresholds: quantiles of the confidences seen if None. The whole ensemble is always the last point.

        Raises:
            InputError: the loader is empty or yields something else, or labels are out of range.
        """
        confidence, correct = self._judged(loader)
        if thresholds is None:
            thresholds = (
                confidence.double()
                .flatten()
                .quantile(torch.linspace(0, 1, 41, dtype=torch.float64))
                .tolist()
            )
        levels = sorted({float(level) for level in thresholds if 0 < level <= 1})
        points = tuple(self._point(level, confidence, correct) for level in (*levels, NEVER))
        return ExitCurve(points, len(confidence))

    def calibrate(self, loader: Iterable[Any], accuracy: float | None = None) -> ExitPoint:
        """Set the threshold that needs the fewest multiply-adds for an accuracy on validation data, and return its point of the curve.

        Args:
            loader: yields (x, y), as for `curve`.
            accuracy: to be reached, between 0 and 1; that of the whole ensemble if None.

        Raises:
            InputError: no threshold reaches the accuracy, or the loader cannot be used; the threshold stays as it was.
        """
        curve = self.curve(loader)
        wanted = curve.points[-1].accuracy if accuracy is None else accuracy
        reached = [point for point in curve.points if point.accuracy >= wanted]
        if not reached:
            best = max(point.accuracy for point in curve.points)
            raise InputError(
                f"no threshold reaches an accuracy of {wanted}. Hint: the best on these {curve.samples} samples is {best:.4f}"
            )
        chosen = min(reached, key=lambda point: point.macs)
        self.threshold = chosen.threshold
        return chosen

    def _goodness(self, values: dict[str, Any]) -> Iterator[Tensor]:
        """Run one stage after the other and yield each one's goodness.

        The values that no later stage reads are removed. Before the next stage runs, the caller
        may thin out the others.
        """
        last_reader: dict[str, int] = {}
        for i, stage in enumerate(self.stages):
            last_reader.update(dict.fromkeys(stage.inputs, i))
        for i, (_, goodness) in enumerate(walk_attached(self.stages, values)):
            for name in list(values):
                if last_reader.get(name, 0) <= i:
                    del values[name]
            yield goodness

    def _keep(self, rows: Tensor, values: dict[str, Any]) -> None:
        for name in self.batched & set(values):
            values[name] = tree_map_only(
                Tensor, lambda tensor: tensor[rows.to(tensor.device)], values[name]
            )

    def _macs(self, blocks: Tensor) -> float:
        total = torch.tensor(
            [0, *(stage.macs for stage in self.stages)], dtype=torch.float64
        ).cumsum(0)
        return float(total[blocks].mean()) if len(blocks) else 0.0

    def _judged(self, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Return the confidence after each block, and whether the answer there is right, (N, K) each."""
        confidence, correct = [], []
        for batch in loader:
            x, y = split_batch(batch)
            means = self.cumulative(x).cpu()
            check_labels(y, means.shape[1], means.shape[2])
            confidence.append(_confidence(means).T)
            correct.append((means.argmax(dim=2) == y.cpu()).T)
        if not confidence:
            raise InputError("the loader yielded no samples")
        return torch.cat(confidence), torch.cat(correct)

    def _point(self, threshold: float, confidence: Tensor, correct: Tensor) -> ExitPoint:
        sure = confidence >= threshold
        sure[:, -1] = True
        at = sure.int().argmax(dim=1)
        right = correct.gather(1, at[:, None]).double().mean()
        return ExitPoint(
            threshold, float(right), self._macs(at + 1), float((at + 1).double().mean())
        )


def _confidence(scores: Tensor) -> Tensor:
    """Return the largest probability of each sample, with the scores, (..., B, J), as logits: (..., B)."""
    return scores.float().softmax(dim=-1).amax(dim=-1)


def _exit_stages(net: fx.GraphModule) -> tuple[tuple[ExitStage, ...], frozenset[str]]:
    """Return the stages of a net in eval mode, and the names of the values with a batch axis."""
    stages = stages_of(net)[:-1]  # the classifier is no exit
    # A value has a batch axis if it has as many rows as there are samples, whatever their number.
    two = _ExampleRun(net, samples=2)
    three = _ExampleRun(net, samples=3)
    exits = []
    for i, stage in enumerate(stages):
        nodes = stage.nodes_from(stages[i - 1] if i else None)
        inputs = nodes_read_by(nodes)
        outputs = [node for node in nodes if node in _read_by_any(stages, i)]
        module = _module(net, nodes, inputs, outputs)
        names = tuple(map(_name, inputs))
        given = tuple(map(_name, outputs))
        with FlopCounterMode(display=False) as counter:
            two.run(module, names, given)
        three.run(module, names, given)
        macs = counter.get_total_flops() // 4  # two operations for each, and two samples
        exits.append(ExitStage(stage.name, names, given, macs, module))
    batched = [
        name
        for name, value in two.values.items()
        if _rows(value) == 2 and _rows(three.values[name]) == 3
    ]
    return tuple(exits), frozenset(batched)


class _ExampleRun:
    """Example values of a number of samples, stage after stage.

    Attributes:
        values: by name.
    """

    def __init__(self, net: fx.GraphModule, samples: int) -> None:
        inputs = plan_of(net).inputs
        tensors = like_the_model(net, random_batch(inputs, samples))
        self.values: dict[str, Any] = {
            each.name: value for each, value in zip(inputs, tensors, strict=True)
        }

    @torch.no_grad()
    def run(self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        """Run one stage, and add its outputs to the values."""
        _, *returned = module(*(self.values[name] for name in inputs))
        self.values.update(zip(outputs, returned, strict=True))


def _read_by_any(stages: Sequence[Stage], index: int) -> set[fx.Node]:
    """Return the nodes that exits after one read."""
    read: set[fx.Node] = set()
    for i in range(index + 1, len(stages)):
        read.update(nodes_read_by(stages[i].nodes_from(stages[i - 1])))
    return read


def _module(
    net: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    """Return some nodes of the outer graph as a module; its first output is the last node."""
    graph = fx.Graph()
    values = {node: graph.placeholder(_name(node)) for node in inputs}
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in (nodes[-1], *outputs)))
    graph.lint()
    return fx.GraphModule(net, graph, class_name="Stage").eval()


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else node.name


def _rows(value: Any) -> int | None:
    """Return the length of the first axis that a tensor, or all tensors of a tuple, have."""
    tensors = list(value) if isinstance(value, (tuple, list)) else [value]
    lengths: set[int | None] = set()
    for tensor in tensors:
        has_rows = isinstance(tensor, Tensor) and tensor.ndim > 0
        lengths.add(len(tensor) if has_rows else None)
    return lengths.pop() if len(lengths) == 1 else None
