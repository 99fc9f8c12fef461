"""The contract of a task: what a model predicts, and what a target is.

Everything in the package that depends on it asks the task: heads, losses, readouts, verification,
evaluation, weights, memory, exports and drawing.

*Scores* are what a head or the classifier returns. The classifier's scores are the model's output.
A block's scores have the same number of outputs J. With `Segmentation` they may have a lower
resolution, and `aligned` brings them to the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from sffx.errors import InputError
from sffx.tensors import require_one_size

# Sums over samples, from which metrics are computed. They may be added over batches and processes.
Sums: TypeAlias = dict[str, Tensor]

# The shape of a batch of values, (B, ...).
Shape: TypeAlias = Sequence[int]
# Returns the sizes of maps, which take a walk through the graph to find.
Maps: TypeAlias = Callable[[], Collection[Shape]]


@dataclass(frozen=True)
class Task:
    """What a model predicts and what a target is.

    Attributes:
        name: of the task, in records.
        form: the form of the heads, a key of `sffx.learning.heads.FORMS`.
        outputs: what J counts, in plural: "classes".
        loss_name: the name of the loss.
        shapes: the shape of the model's output, for messages.
        per_position: whether a position is scored, a token or a pixel, and not the sample.
        has_goodness: whether the paper's head is a goodness, and not a linear readout.
        probability_function: turns scores into probabilities, "" where there are none.
        norms_tokens: whether the norm between two blocks looks at each token by itself.
        has_confidence: whether a sample has a confidence, by which it can exit early.
        shares: the metrics that are shares, between 0 and 1.
        means: the metrics that are means over what was counted, with the sums they are made from.
    """

    name: ClassVar[str] = ""
    form: ClassVar[str] = "sample"
    outputs: ClassVar[str] = "classes"
    loss_name: ClassVar[str] = "cross-entropy"
    shapes: ClassVar[str] = "(B, J)"
    per_position: ClassVar[bool] = False
    has_goodness: ClassVar[bool] = True
    probability_function: ClassVar[str] = "softmax"
    norms_tokens: ClassVar[bool] = False
    has_confidence: ClassVar[bool] = False
    shares: ClassVar[tuple[str, ...]] = ("accuracy",)
    means: ClassVar[dict[str, str]] = {"accuracy": "correct", "loss": "loss"}

    # The model's output.

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        """Return whether a float tensor of this shape, (B, ...), could be the model's output.

        Args:
            shape: of the tensor.
            num_outputs: J where it is known.
        """
        raise NotImplementedError

    def settled(self, shape: Shape, inputs: Sequence[Shape] = ()) -> Task:
        """Return the task for a model's output of this shape, where options depend on it.

        Args:
            shape: of the output.
            inputs: the shapes of the inputs that hold floats, where they are known.
        """
        return self

    def num_outputs(self, shape: Shape) -> int:
        """Return J, given the shape of the model's output."""
        return int(shape[1])

    def require_outputs(self, num_outputs: int) -> None:
        """Raise an InputError if a model with J outputs cannot have this task."""

    def way_to_output(self, shape: Shape) -> str:
        """Return the hint for a model whose output has a shape that the task does not have."""
        return "pass another task of sffx.tasks"

    def fits(self, shape: Shape, output: Shape) -> bool:
        """Return whether scores of a shape go with a model's output of another shape."""
        return tuple(shape) == tuple(output)

    def why_not_scored(
        self, shape: Shape, channel_axis: int, output: Shape, maps: Maps = tuple
    ) -> str:
        """Return why a head cannot score a value, "" where it can.

        Args:
            shape: of the value, (B, ...).
            channel_axis: of the value.
            output: shape of the model's output.
            maps: returns the sizes of the maps that the positions of the value are pixels of.
        """
        return ""

    def count_in_words(self, num_outputs: int) -> str:
        """Return how many outputs there are: "10 classes"."""
        return f"{num_outputs} {self.outputs}"

    # Targets.

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        """Raise an InputError if y is no target for the loss of a batch.

        Args:
            y: what was passed.
            batch: B.
            num_outputs: J.
        """
        raise NotImplementedError

    def check_labels(self, y: Any, batch: int, num_outputs: int) -> None:
        """Raise an InputError if y is no target to evaluate with."""
        self.check_targets(y, batch, num_outputs)

    def require_size(self, y: Any, of_answer: bool, shapes: Sequence[Shape]) -> None:
        """Raise an InputError if the positions of targets are those of something else.

        Args:
            y: what was passed; nothing is said of what are no targets of the task.
            of_answer: whether the shapes are that of the model's output, or those of its inputs
                that hold floats.
            shapes: with the batch.
        """

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        """Return valid targets for a model's output of a shape, (B, ...)."""
        raise NotImplementedError

    def require_inputs(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        """Raise an InputError if targets do not go with the model's inputs.

        It is called where their values can be looked at; on a GPU for the first batch alone.

        Args:
            y: targets.
            inputs: of the model, those on the device of the targets.
        """

    def without_padding(self, y: Any, mask: Tensor | None) -> Any:
        """Return targets that leave out padding.

        Args:
            y: targets.
            mask: of the model's input, (B, T), zero at padding; None where there is none.
        """
        return y

    # Scores.

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Return the loss of one block, a scalar.

        Args:
            scores: of the block or the classifier, in float32 or wider.
            y: targets, which `check_targets` has passed.
        """
        raise NotImplementedError

    def compared_with(self, y: Any, scores: Tensor) -> Tensor:
        """Return the scores of a block in the shape in which a user's loss compares them with y.

        Args:
            y: what was passed as targets, which the task has not checked.
            scores: of the block or the classifier.
        """
        return scores

    def gathered(self, scores: Sequence[Tensor]) -> Any:
        """Return the scores of all blocks as a cut model returns them in train mode."""
        return tuple(scores)

    def aligned(self, scores: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        """Return the scores of all blocks in the shape of the last, the classifier's.

        It must not look at values, since an exporter passes proxies.
        """
        return scores

    def mixture(self, scores: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
        """Return the scores of the weighted mean of the blocks' predictions.

        Args:
            scores: aligned, of some blocks.
            weights: one for each, with the sum 1.
        """
        raise NotImplementedError

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the probability that scores give each target, (N,).

        Raises:
            InputError: scores of this task are no probabilities.
        """
        raise InputError(
            f"the predictions of {self!r} are no probabilities, which sffx.weigh mixes. "
            "Hint: net.readout.mode = 'ensemble' or 'last'"
        )

    # Metrics.

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        """Return the sums of a batch: "count", those in `means`, and what `metrics` reads."""
        raise NotImplementedError

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return the metrics of sums: those in `means`, and others by name."""
        return self.mean_metrics(sums)

    def mean_metrics(self, sums: Sums) -> dict[str, float]:
        """Return the metrics that are means over what was counted, 0 where nothing was."""
        count = float(sums["count"])
        if not count:
            return dict.fromkeys(self.means, 0.0)
        return {name: float(sums[source]) / count for name, source in self.means.items()}

    def by_class(self, sums: Sums) -> tuple[float, ...]:
        """Return the metric of each class, () where the task has none."""
        return ()


def blocks_that_count(weights: Sequence[float]) -> list[int]:
    """Return the indices of the blocks that a mixture reads.

    A block with a weight of 0 is left out, since 0 times a goodness of nan would be nan.
    """
    return [i for i, weight in enumerate(weights) if weight > 0]


def require_confidence(task: Task) -> None:
    """Raise an InputError if the samples of a task cannot exit early."""
    if not task.has_confidence:
        raise InputError(
            f"an early exit stops a sample whose class is confident, and sffx.tasks.{task!r} has "
            "no class of a sample. Hint: export the readout 'cumulative', the answer after each "
            "block, and stop as your application sees fit"
        )


def require_tensor(y: Any, hint: str) -> None:
    """Raise an InputError if targets are no tensor, or one of another layout."""
    if not isinstance(y, Tensor):
        raise InputError(f"y is a {type(y).__name__}, not a tensor. Hint: {hint}")
    require_one_size("y", y)
    if y.layout != torch.strided:
        raise InputError(f"y is a tensor of layout {y.layout}. Hint: pass y.to_dense()")


def can_be_read(y: Tensor) -> bool:
    """Return whether targets have values that can be looked at, on any device.

    Fake tensors and those on "meta" have none, and a graph of CUDA that is being captured has none
    yet.
    """
    if type(y) is not Tensor or y.is_meta or not y.numel():
        return False
    return not (y.is_cuda and torch.cuda.is_current_stream_capturing())


def has_values(y: Tensor) -> bool:
    """Return whether the values of targets can be looked at without waiting for a device.

    A check on a GPU would wait for it.
    """
    return can_be_read(y) and y.device.type == "cpu"
