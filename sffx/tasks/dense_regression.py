"""Numbers of pixels, of voxels, or of the samples of a signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.tasks.over_space import AXES, OverSpace, sizes_of_images
from sffx.tasks.regression import Regression, require_numbers
from sffx.tasks.task import Shape, Sums, require_tensor

_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@dataclass(frozen=True)
class DenseRegression(OverSpace, Regression):
    """Numbers of pixels: images from images, depth, flow, fields of physics.

    The model's output is (B, N, H, W), and y is the same; with volumes (B, N, D, H, W), with
    signals (B, N, T).

    The head of a block is a linear readout at each position, `s[n, :, p] = W Y[n, :, p] + b`, at
    the block's own resolution; "mlp" has a hidden layer. The loss of a block is the squared error,
    the mean over all numbers. Where scores and y differ in size, the finer of the two is averaged
    over the pixels that fall into one of the other.

    In train mode the net returns a tuple, in which each block has its own resolution. In eval mode
    the numbers are enlarged to the size of the answer, and the ensemble is their mean. A block of
    low resolution blurs it, so the readout "last" or "classifier" may be the better answer.

    `sffx.evaluate` enlarges the scores to the size of y. It reports what it reports for
    `Regression`, with R2 over all pixels.

    Bring targets to a mean of 0 and a variance of 1 before the training. The norm between two
    blocks removes the scale of a sample. Where it matters, as in physics, pass `norm="none"`.
    """

    name: ClassVar[str] = "dense-regression"
    form: ClassVar[str] = "field"
    outputs: ClassVar[str] = "numbers of pixels"

    @property
    def shapes(self) -> str:  # type: ignore[override]
        return " or ".join(f"(B, N, {axes})" for axes in AXES.values())

    def way_to_output(self, shape: Shape) -> str:
        if len(shape) == 2:
            return "for numbers of a sample pass task=sffx.tasks.Regression()"
        return "return one tensor with the numbers of a pixel in axis 1"

    def count_in_words(self, num_outputs: int) -> str:
        return f"{super().count_in_words(num_outputs)} for each pixel"

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass numbers, torch.tensor(y)")
        if y.ndim != self.space + 2 or tuple(y.shape[:2]) != (batch, num_outputs):
            raise InputError(
                f"y has shape {tuple(y.shape)}, not ({batch}, {num_outputs}, {AXES[self.space]}). "
                "Hint: the numbers of each pixel"
            )
        require_numbers(y)

    def require_size(self, y: Any, of_answer: bool, shapes: Sequence[Shape]) -> None:
        if not isinstance(y, Tensor) or y.ndim != self.space + 2:
            return
        given = sizes_of_images(shapes, self.space)
        sizes = given if of_answer else self._sizes_of_answers(given)
        size = tuple(y.shape[2:])
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

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        scores = self.on_map(scores, y.shape[2:])
        size = tuple(map(min, scores.shape[2:], y.shape[2:]))
        y = self._averaged(y.to(scores.dtype), size)
        return super().loss(self._averaged(scores, size), y)

    def _averaged(self, values: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return values (B, N, ...) at a lower resolution."""
        return values if values.shape[2:] == size else _POOLS[self.space](values, size)

    def compared_with(self, y: Any, scores: Tensor) -> Tensor:
        # A loss of the user's own gets both in one size.
        if isinstance(y, Tensor) and y.ndim == self.space + 2:
            return self.resized(scores, y.shape[2:])
        return scores

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        scores = self.resized(scores, y.shape[2:])
        sums = super().sums(_rows(scores), _rows(y))
        return {**sums, "count": torch.tensor(y.numel(), device=y.device)}


def _rows(values: Tensor) -> Tensor:
    """Return numbers (B, N, ...) as those of all pixels, (P, N)."""
    return values.movedim(1, -1).flatten(0, -2)
