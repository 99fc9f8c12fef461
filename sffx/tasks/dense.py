"""What the tasks over space share whose targets have the shape of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.tasks.missing import MayLackTargets
from sffx.tasks.over_space import AXES, OverSpace, sizes_of_images
from sffx.tasks.task import Shape, Sums, Task, require_tensor

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@dataclass(frozen=True)
class Dense(OverSpace, MayLackTargets):
    """A task whose output is (B, N, ...), and y is the same: numbers or labels of pixels.

    With N = 1 both may lack the axis of N. Where the scores of a block and y differ in size, the
    finer of the two is averaged over the pixels that fall into one of the other.

    A subclass is a task of a sample as well, of which it takes the loss and the metrics: each pixel
    is a sample there.

    Attributes:
        lacks_axis: whether the output is one value for each place, without an axis for it.
            `transform` sets it.
        what: the values of a pixel in one word, for messages.
        task_of_sample: the name of the task whose values are of a sample.
    """

    lacks_axis: bool = False

    what: ClassVar[str] = ""
    task_of_sample: ClassVar[str] = ""

    @property
    def shapes(self) -> str:  # type: ignore[override]
        if self.lacks_axis:
            return f"(B, {AXES[self.space]})"
        return " or ".join(f"(B, N, {axes})" for axes in AXES.values())

    # The model's output.

    def settled(self, shape: Shape, inputs: Sequence[Shape] = ()) -> Task:
        task = replace(self, lacks_axis=self._lacks_axis(shape, inputs))
        return OverSpace.settled(task, shape, inputs)

    def space_of(self, shape: Shape, inputs: Sequence[Shape]) -> int:
        return super().space_of(shape, inputs) + self._lacks_axis(shape, inputs)

    def _lacks_axis(self, shape: Shape, inputs: Sequence[Shape]) -> bool:
        """Return whether an output is a map of the inputs, (B, C, ...), without the axis C."""
        if not inputs:
            return self.lacks_axis and len(shape) == self.space + 1
        if any(len(each) == len(shape) for each in inputs):
            return False
        # A list of points, (B, 17, 2), is no map of an image.
        maps = [each for each in inputs if len(each) - 2 in AXES and len(each) == len(shape) + 1]
        return any(_has_proportions(shape[1:], each[2:]) for each in maps)

    def num_outputs(self, shape: Shape) -> int:
        return 1 if self.lacks_axis else super().num_outputs(shape)

    def way_to_output(self, shape: Shape) -> str:
        if len(shape) == 2:
            return f"for {self.what} of a sample pass task=sffx.tasks.{self.task_of_sample}()"
        return f"return one tensor with the {self.what} of a pixel in axis 1"

    def count_in_words(self, num_outputs: int) -> str:
        return f"{super().count_in_words(num_outputs)} for each pixel"

    # Targets.

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, f"pass the {self.what} of each pixel, torch.tensor(y)")
        values = self._with_axis(y) if num_outputs == 1 else y
        if values.ndim != self.space + 2 or tuple(values.shape[:2]) != (batch, num_outputs):
            raise InputError(
                f"y has shape {tuple(y.shape)}, not ({batch}, {num_outputs}, {AXES[self.space]}). "
                f"Hint: the {self.what} of each pixel"
            )
        self.check_values(y)

    def check_values(self, y: Tensor) -> None:
        """Raise an InputError if the values of targets are none of the task."""
        raise NotImplementedError

    def require_size(self, y: Any, of_answer: bool, shapes: Sequence[Shape]) -> None:
        if not isinstance(y, Tensor) or y.ndim < self.space + 1:
            return
        if of_answer:
            sizes = {tuple(shape[-self.space :]) for shape in shapes}
        else:
            sizes = self._sizes_of_answers(sizes_of_images(shapes, self.space))
        size = tuple(y.shape[-self.space :])
        if not sizes or size in sizes:
            return
        of_output = " or ".join(" x ".join(map(str, each)) for each in sorted(sizes))
        raise InputError(
            f"y has {' x '.join(map(str, size))} pixels, but the model's output {of_output}. "
            "Hint: targets of the size of the output"
        )

    def _sizes_of_answers(self, images: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """Return the sizes of the model's output for images of some sizes, {} where not known."""
        if not self.example_sizes:
            return set()
        image, answer = self.example_sizes
        if images == {image}:
            return {answer}
        # A model may round sizes that it divides, so only multiples are sure.
        if any(new % old for old, new in zip(image, answer, strict=True)):
            return set()
        factors = [new // old for old, new in zip(image, answer, strict=True)]
        sizes = set()
        for size in images:
            sizes.add(tuple(n * factor for n, factor in zip(size, factors, strict=True)))
        return sizes

    # Scores.

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        y = self._with_axis(y)
        scores = self.on_map(scores, y.shape[2:])
        size = tuple(map(min, scores.shape[2:], y.shape[2:]))
        y = self._averaged_targets(y.to(scores.dtype), size)
        return super().loss(self._averaged(scores, size), y)

    def _averaged_targets(self, y: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return targets (B, N, ...) at a lower resolution: the mean of those that count."""
        if not self.skip_nan or y.shape[2:] == size:
            return self._averaged(y, size)
        is_counted = self.is_counted(y)
        means = self._averaged(y.masked_fill(~is_counted, 0), size)
        # Where none counts, this is 0 / 0: nan, which is left out.
        return means / self._averaged(is_counted.to(y.dtype), size)

    def _averaged(self, values: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return values (B, N, ...) at a lower resolution."""
        return values if values.shape[2:] == size else _POOLS[self.space](values, size)

    def on_map(self, scores: Tensor, size: torch.Size) -> Tensor:
        return super().on_map(self._scores_with_axis(scores), size)

    def _scores_with_axis(self, scores: Tensor) -> Tensor:
        """Return scores as (B, N, ...), or (B, N, tokens) where they are of tokens."""
        # An exporter passes proxies of the blocks' scores, which have the axis.
        if not self.lacks_axis or not isinstance(scores, Tensor):
            return scores
        are_of_tokens = scores.shape[1] == 1
        return scores if are_of_tokens else self._with_axis(scores)

    def _with_axis(self, values: Tensor) -> Tensor:
        """Return values as (B, N, ...), also those that lack the axis of a single one."""
        return values.unsqueeze(1) if values.ndim == self.space + 1 else values

    def aligned(self, scores: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        *resized, output = super().aligned(scores)
        if self.lacks_axis:
            resized = [own.squeeze(1) for own in resized]
        return [*resized, output]

    def compared_with(self, y: Any, scores: Tensor) -> Tensor:
        # A loss of the user's own gets both in one size, with or without the axis of one value.
        if not isinstance(y, Tensor) or y.ndim not in (self.space + 1, self.space + 2):
            return scores
        resized = self.resized(scores, y.shape[-self.space :])
        lacks_axis = y.ndim == self.space + 1 and resized.shape[1] == 1
        return resized.squeeze(1) if lacks_axis else resized

    # Metrics.

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        return super().sums(*self._rows_of_pixels(scores, y))

    def _rows_of_pixels(self, scores: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and targets of all pixels at full size, (P, N) each."""
        y = self._with_axis(y)
        return _rows(self.resized(scores, y.shape[2:])), _rows(y)


def _rows(values: Tensor) -> Tensor:
    """Return values (B, N, ...) as those of all pixels, (P, N)."""
    return values.movedim(1, -1).flatten(0, -2)


def _has_proportions(answer: Shape, image: Shape) -> bool:
    """Return whether an answer may be a map of an image: the same share of each side, or margin."""
    margins = {old - new for old, new in zip(image, answer, strict=True)}
    # Strides round each side by itself.
    share = answer[0] / image[0]
    are_shares = all(abs(new - old * share) <= 1 for old, new in zip(image, answer, strict=True))
    return len(margins) == 1 or are_shares
