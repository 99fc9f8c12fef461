"""Early exit: blocks run one after the other, and a sample stops at the first one that is sure of it.

Local learning gives every block an answer of its own. After each block the answer so far is the mean of the goodness of the blocks up to
it, the ensemble of section 4.3 cut short, and its confidence is the largest entry of that mean's softmax, as in the loss. Samples that
reach the threshold leave the batch, so what follows is not computed for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sffx.blocks import BlockPlan, Input
from sffx.errors import InputError
from sffx.export.prepare import random_inputs
from sffx.learning.losses import check_labels, check_pair
from sffx.net import plan_of
from sffx.runtime.shard import require_whole

NEVER = 2.0  # a threshold that no softmax reaches


@dataclass(frozen=True)
class Stage:
    """One block with its head, as the runner runs it.

    Attributes:
        name: of the block, "block_0".
        inputs: names of the values that it reads.
        outputs: names of the values that later stages read; its goodness, (B, J), comes before them.
        macs: multiply-adds for one sample, the head included.
        run: from the inputs, in order, to the goodness and the outputs, in order.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    run: Callable[..., Sequence[Any]]


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
        self.stages, self.batched = _stages(copy.deepcopy(net).eval(), plan)

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
        values = self._arguments(x)
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
        values = self._arguments(x)
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
        """Run the stages one after the other and yield each one's goodness, when its values have taken the place of those that no later
        stage reads; before the next stage runs, the caller may thin out the values."""
        last_reader = {name: i for i, stage in enumerate(self.stages) for name in stage.inputs}
        for i, stage in enumerate(self.stages):
            goodness, *outputs = stage.run(*(values[name] for name in stage.inputs))
            for name in [name for name in values if last_reader.get(name, i) <= i]:
                del values[name]
            values.update(zip(stage.outputs, outputs, strict=True))
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
            check_pair(batch)
            means = self.cumulative(batch[0]).cpu()
            check_labels(batch[1], means.shape[1], means.shape[2])
            confidence.append(_confidence(means).T)
            correct.append((means.argmax(dim=2) == batch[1].cpu()).T)
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

    def _arguments(self, x: Any) -> dict[str, Any]:
        """Pair the model's inputs with their names."""
        names = [each.name for each in self.inputs]
        values = (
            dict(x)
            if isinstance(x, Mapping)
            else dict(zip(names, x if isinstance(x, (tuple, list)) else (x,), strict=False))
        )
        given = len(x) if isinstance(x, (Mapping, tuple, list)) else 1
        if set(values) != set(names) or given != len(names):
            raise InputError(
                f"x holds {given} inputs ({', '.join(values)}), but the model takes {len(names)}: {', '.join(names)}"
            )
        return values


def _confidence(scores: Tensor) -> Tensor:
    """Return the largest probability of each sample, with the scores, (..., B, J), as logits: (..., B)."""
    return scores.float().softmax(dim=-1).amax(dim=-1)


def _stages(net: fx.GraphModule, plan: BlockPlan) -> tuple[tuple[Stage, ...], frozenset[str]]:
    """Take the outer graph apart at the heads. Returns the stages and the names of the values that have a batch axis."""
    parts = _parts(net.graph, len(plan))
    stages: list[Stage] = []
    small, large = (
        {
            each.name: value
            for each, value in zip(plan.inputs, _like(net, plan.inputs, n), strict=True)
        }
        for n in (2, 3)
    )
    for i, (block, part) in enumerate(zip(plan, parts, strict=True)):
        inputs = list(
            dict.fromkeys(n for node in part for n in node.all_input_nodes if n not in part)
        )
        later = {n for other in parts[i + 1 :] for node in other for n in node.all_input_nodes}
        outputs = [node for node in part if node in later]
        module = _module(net, part, inputs, outputs)
        names = [_name(node) for node in inputs]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            small.update(
                zip(map(_name, outputs), module(*(small[name] for name in names))[1:], strict=True)
            )
        with torch.no_grad():
            large.update(
                zip(map(_name, outputs), module(*(large[name] for name in names))[1:], strict=True)
            )
        macs = counter.get_total_flops() // 4  # two operations each, two samples
        stages.append(Stage(block.target, tuple(names), tuple(map(_name, outputs)), macs, module))
    batched = frozenset(
        name for name in small if _rows(small[name]) == 2 and _rows(large[name]) == 3
    )
    return tuple(stages), batched


def _parts(graph: fx.Graph, blocks: int) -> list[list[fx.Node]]:
    """Return the nodes of each block, from the head before it, excluded, to its own, included."""
    parts: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        parts[-1].append(node)
        if node.op == "call_module" and node.target == f"head_{len(parts) - 1}":
            parts.append([])
    return parts[:blocks]


def _module(
    net: fx.GraphModule, part: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    values = {node: graph.placeholder(_name(node)) for node in inputs}
    for node in part:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in (part[-1], *outputs)))
    graph.lint()
    return fx.GraphModule(net, graph, class_name="Stage").eval()


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else node.name


def _like(net: fx.GraphModule, inputs: tuple[Input, ...], batch: int) -> list[Tensor]:
    """Return example inputs on the device and, where they are floats, in the dtype of the model."""
    like = next(p for p in net.parameters() if p.is_floating_point())
    return [
        each.to(like.device, like.dtype if each.is_floating_point() else each.dtype)
        for each in random_inputs(inputs, batch)
    ]


def _rows(value: Any) -> int | None:
    """Return the length of the first axis of a tensor or of every tensor in a tuple; None where there is none, or no one length."""
    tensors = (
        [value]
        if isinstance(value, Tensor)
        else list(value)
        if isinstance(value, (tuple, list))
        else []
    )
    lengths = {len(each) if isinstance(each, Tensor) and each.ndim else None for each in tensors}
    return lengths.pop() if len(lengths) == 1 else None
