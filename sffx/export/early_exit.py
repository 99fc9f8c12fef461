"""Early exit: a sample stops at the first block whose answer is confident.

With local learning, every block has an answer of its own. The answer after a block is the mean of
the goodness of the blocks up to it: the ensemble of section 4.3, over fewer blocks. Its confidence
is the largest entry of that mean's softmax. Samples that reach the threshold leave the batch, so
later blocks are not computed for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sffx.checks import is_number
from sffx.errors import InputError, shown
from sffx.export.exit_files import load
from sffx.export.exit_stage import exit_stages, kept
from sffx.files import as_path
from sffx.inputs import batch_size, batches, bind_inputs, explaining_errors, split_batch
from sffx.learning.readouts import mean_goodness
from sffx.net import cut_model
from sffx.objective import require_single_try
from sffx.runtime.find_residency import make_whole, require_values
from sffx.runtime.walk import walk_attached
from sffx.tables import Column, text_table
from sffx.tasks import CLASSIFICATION
from sffx.tasks.task import require_confidence
from sffx.tensors import copied, without_arrays

# A threshold that no confidence reaches, since a softmax is at most 1.
NEVER = 2.0

# By default the thresholds of a curve are so many quantiles of the confidences that occur.
CURVE_POINTS = 41


@dataclass(frozen=True)
class EarlyScores:
    """The runner's answer for a batch.

    Attributes:
        scores: the mean of the goodness of the blocks that a sample went through, (B, J).
        blocks: the number of those blocks, (B,), from 1.
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
        columns = [
            Column("threshold"),
            Column("accuracy"),
            Column("blocks"),
            Column("MACs", width=14),
        ]
        rows = []
        for point in self.points:
            threshold = "none" if point.threshold > 1 else f"{point.threshold:.4f}"
            accuracy = f"{point.accuracy:.2%}"
            rows.append((threshold, accuracy, f"{point.blocks:.2f}", f"{point.macs:,.0f}"))
        return text_table(columns, rows, note=f"({self.samples} samples)")


class EarlyExit:
    """A runner that stops, sample by sample, at the first block that is confident.

    The confidence after a block is the softmax maximum of the mean of the goodness so far. The
    weights of `sffx.weigh` are not used. With a threshold above 1 no sample leaves early, and the
    scores are those of the ensemble, bit by bit. The model is copied and runs in eval mode, on its
    device.

    Args:
        net: what `sffx.transform` returned.
        threshold: of the confidence, from 0 on; `calibrate` chooses one.

    Attributes:
        inputs: of the model.
        nested: the arguments in which they lie, None where each is one.
        stages: the feature blocks, in order. The classifier is not among them.
        batched: the batch axes of the values that have one, by name.
        skips: how many of the first blocks have no answer, since the ensemble leaves them out.
        class_names: one for each class, as `export_early_exit` was given them; None without a file.
        mean: with which each channel was normalised in training, likewise. x must be normalised.
        std: likewise.

    Raises:
        InputError: `net` is no cut model, is sharded or does not tell classes of a sample apart, or
            `threshold` is not a number from 0 on.
    """

    def __init__(self, net: nn.Module, threshold: float = 0.9) -> None:
        cut = cut_model(net)
        make_whole(cut)
        require_values(cut)
        require_confidence(cut.plan.task)
        require_single_try(cut.plan.objective, cut.plan.num_classes, "an early exit")
        self.threshold = threshold
        self.inputs = cut.plan.inputs
        self.nested = cut.plan.nested
        # The copy's parameters keep their requires_grad. A head chooses its form by it, and the
        # form must be the one that `net` itself takes.
        self.stages, self.batched = exit_stages(copied(cut).eval())
        self.skips = min(cut.readout.skips, len(self.stages) - 1)
        self.class_names: tuple[str, ...] | None = None
        self.mean: tuple[float, ...] | None = None
        self.std: tuple[float, ...] | None = None

    @classmethod
    def load(cls, folder: str | Path, threshold: float | None = None) -> EarlyExit:
        """Return a runner on ONNX Runtime, from a folder that `sffx.export_early_exit` wrote.

        Args:
            folder: that was written.
            threshold: None takes the one that was written with it.

        Raises:
            InputError: there is no such export in the folder, or it cannot be read.
            MissingExtra: onnxruntime is not installed.
        """
        manifest, stages = load(as_path(folder))
        runner = cls.__new__(cls)  # without `__init__`, which takes a cut model
        runner.threshold = manifest.threshold if threshold is None else threshold
        runner.inputs = manifest.inputs
        runner.nested = manifest.nested
        runner.stages = stages
        runner.batched = dict(manifest.batched)
        runner.skips = manifest.skips
        runner.class_names = manifest.class_names
        runner.mean = manifest.mean
        runner.std = manifest.std
        return runner

    @property
    def threshold(self) -> float:
        """The confidence at which a sample stops."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        if not is_number(threshold) or threshold < 0:
            raise InputError(
                f"the threshold is {shown(threshold)}. "
                "Hint: pass a number from 0 on, where all stop early; above 1, no sample does"
            )
        self._threshold = float(threshold)

    @torch.no_grad()
    def __call__(self, x: Any) -> EarlyScores:
        """Run the blocks on a batch, each on the samples that have not left yet.

        Args:
            x: the input, (B, ...), a tensor or an array of numpy; a tuple of positional or a
                mapping of keyword arguments if the model has several.

        Raises:
            InputError: x does not fit the model's inputs.
        """
        values = bind_inputs(self.inputs, without_arrays(x), self.nested)
        samples = batch_size(values)
        blocks = torch.zeros(samples, dtype=torch.int64, device="cpu")
        scores: Tensor | None = None
        # Indices in x of the samples that are still in the batch, on the CPU.
        remaining = torch.arange(samples, device="cpu")
        # The goodness of these samples, one tensor for each block so far.
        goodness: list[Tensor] = []
        for depth, new_goodness in enumerate(self._goodness(values), start=1):
            if depth <= self.skips:
                continue
            goodness.append(new_goodness)
            mean = mean_goodness(goodness)
            if scores is None:
                # Before the first block has run, the number of classes is not known.
                scores = torch.zeros_like(mean)
            # Later blocks may give wider floats, as under autocast.
            scores = scores.to(mean.dtype)
            leaves = _confidence(mean) >= self.threshold
            if depth == len(self.stages):
                # After the last block every sample leaves.
                leaves[:] = True
            leaving = remaining[leaves.cpu()]
            scores[leaving.to(scores.device)] = mean[leaves]
            blocks[leaving] = depth
            if leaves.all():
                break
            if leaves.any():
                stays = ~leaves
                remaining = remaining[stays.cpu()]
                goodness = [each[stays] for each in goodness]
                self._keep_rows(stays, values)
        assert scores is not None  # a plan has at least one block
        return EarlyScores(scores, blocks, self._mean_macs(blocks))

    @torch.no_grad()
    def cumulative(self, x: Any) -> Tensor:
        """Return the mean of the goodness up to each feature block, whatever the threshold.

        The shape is (feature blocks, B, J). The last one is the ensemble. Blocks that it leaves out
        have no answer.
        """
        values = bind_inputs(self.inputs, without_arrays(x), self.nested)
        batch_size(values)  # for its error: x holds no tensor
        goodness = list(self._goodness(values))[self.skips :]
        depths = range(1, len(goodness) + 1)
        return torch.stack([mean_goodness(goodness[:depth]) for depth in depths])

    def curve(self, loader: Iterable[Any], thresholds: Sequence[float] | None = None) -> ExitCurve:
        """Return accuracy against mean multiply-adds for a range of thresholds.

        The runner's own threshold stays as it is.

        Args:
            loader: yields (x, y) of validation data: x as the runner takes it, and class indices y,
                (B,).
            thresholds: from 0 on. None takes quantiles of the confidences. The whole ensemble is
                always the last point; thresholds above 1 give the same.

        Raises:
            InputError: the loader is empty or yields something else, labels are out of range, or a
                threshold is not a number from 0 on.
        """
        confidence, correct = self._judged(loader)
        if thresholds is None:
            shares = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64, device="cpu")
            given = confidence.double().flatten().quantile(shares).tolist()
        else:
            given = _numbers(thresholds)
        levels = {threshold for threshold in given if threshold <= 1}
        points = [self._point(level, confidence, correct) for level in sorted(levels)]
        points.append(self._point(NEVER, confidence, correct))
        return ExitCurve(tuple(points), len(confidence))

    def calibrate(self, loader: Iterable[Any], accuracy: float | None = None) -> ExitPoint:
        """Set the threshold that reaches an accuracy with the fewest multiply-adds.

        Args:
            loader: yields (x, y) of validation data, as for `curve`.
            accuracy: to be reached, between 0 and 1; None takes that of the whole ensemble.

        Returns:
            the threshold's point of the curve.

        Raises:
            InputError: no threshold reaches the accuracy, or the loader cannot be used. The
                threshold then stays as it was.
        """
        is_share = is_number(accuracy) and 0 <= accuracy <= 1
        if accuracy is not None and not is_share:
            raise InputError(f"accuracy is {shown(accuracy)}. Hint: pass a number between 0 and 1")
        curve = self.curve(loader)
        wanted = curve.points[-1].accuracy if accuracy is None else accuracy
        reached = [point for point in curve.points if point.accuracy >= wanted]
        if not reached:
            best = max(point.accuracy for point in curve.points)
            raise InputError(
                f"no threshold reaches an accuracy of {wanted}. "
                f"Hint: the best on these {curve.samples} samples is {best:.4f}"
            )
        chosen = min(reached, key=lambda point: point.macs)
        self.threshold = chosen.threshold
        return chosen

    def _goodness(self, values: dict[str, Any]) -> Iterator[Tensor]:
        """Run one stage after the other and yield each one's goodness.

        The values that no later stage reads are removed. Before the next stage runs, the caller
        may remove samples from the other values.
        """
        last_reader: dict[str, int] = {}
        for index, stage in enumerate(self.stages):
            for name in stage.inputs:
                last_reader[name] = index
        with explaining_errors(self.inputs, self._parameters, dict(values)):
            for index, (_, goodness) in enumerate(walk_attached(self.stages, values)):
                for name in list(values):
                    # A value without a reader goes after the first stage.
                    if last_reader.get(name, 0) <= index:
                        del values[name]
                yield goodness

    def _parameters(self) -> Iterator[Tensor]:
        """Yield the parameters of the stages; those of files have none."""
        for stage in self.stages:
            if isinstance(stage.run, nn.Module):
                yield from stage.run.parameters()

    def _keep_rows(self, stays: Tensor, values: dict[str, Any]) -> None:
        """Remove samples from the values, given for each sample whether it stays, (B,)."""

        for name, axis in self.batched.items():
            if name in values:
                values[name] = kept(values[name], stays, axis)

    def _mean_macs(self, blocks: Tensor) -> float:
        """Return the mean multiply-adds, given how many blocks each sample went through, (B,)."""
        if not len(blocks):
            return 0.0
        # At index k, the multiply-adds of the first k blocks.
        totals = accumulate((stage.macs for stage in self.stages), initial=0)
        of_depth = torch.tensor(list(totals), dtype=torch.float64, device="cpu")
        return float(of_depth[blocks].mean())

    def _judged(self, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Return the confidence after each block and whether its answer is right, (N, K) each."""
        confidence = []
        correct = []
        for batch in batches(loader):
            x, y = split_batch(batch)
            means = self.cumulative(x).cpu()
            CLASSIFICATION.check_labels(y, means.shape[1], means.shape[2])
            confidence.append(_confidence(means).T)
            correct.append((means.argmax(dim=2) == y.cpu()).T)
        if not sum(map(len, confidence)):
            raise InputError("the loader yielded no samples. Hint: pass validation data")
        return torch.cat(confidence), torch.cat(correct)

    def _point(self, threshold: float, confidence: Tensor, correct: Tensor) -> ExitPoint:
        """Return the point of the curve, given what `_judged` returns."""
        is_confident = confidence >= threshold
        # After the last block every sample leaves.
        is_confident[:, -1] = True
        # The first maximum: the first block that is confident.
        exits = is_confident.int().argmax(dim=1)
        accuracy = correct.gather(1, exits[:, None]).double().mean()
        blocks = self.skips + exits + 1
        mean_blocks = blocks.double().mean()
        return ExitPoint(threshold, float(accuracy), self._mean_macs(blocks), float(mean_blocks))


def _numbers(thresholds: Sequence[float]) -> list[float]:
    """Return thresholds as numbers.

    Raises:
        InputError: one of them is no number from 0 on.
    """
    try:
        # The letters of a text are no thresholds.
        if isinstance(thresholds, (str, bytes)):
            raise TypeError("no list of numbers")
        levels = [float(level) for level in thresholds]
    # A tensor without values raises a RuntimeError.
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"thresholds is {shown(thresholds)}. Hint: pass a list of numbers between 0 and 1"
        ) from error
    for level in levels:
        if not level >= 0:  # so is nan
            raise InputError(
                f"thresholds holds {level}. "
                "Hint: pass numbers from 0 on, where all stop early; above 1, no sample does"
            )
    return levels


def _confidence(scores: Tensor) -> Tensor:
    """Return the largest probability of each sample, (..., B), from scores as logits."""
    return scores.float().softmax(dim=-1).amax(dim=-1)
