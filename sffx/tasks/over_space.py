"""What the tasks share whose output lies over axes of space: an image, a volume or a signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.tasks.grid import grid_of, on_grid
from sffx.tasks.task import Maps, Shape, Task

# By the number of axes of space: their names, and how scores are enlarged.
AXES = {1: "T", 2: "H, W", 3: "D, H, W"}
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class OverSpace(Task):
    """A task whose output is (B, N, ...), with N outputs at each place of an image or a volume.

    Each block has a resolution of its own. For answers and metrics its scores are brought to the
    size of the model's output. Tokens of a vision transformer may be pixels of a block.

    Attributes:
        space: the number of axes of space: 2 of images, 3 of volumes, 1 of signals. `transform`
            sets it.
        example_sizes: of the image and of the answer in the example; () where they are not known.
            `transform` sets it.
    """

    space: int = 2
    example_sizes: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)

    per_position: ClassVar[bool] = True

    def settled(self, shape: Shape, inputs: Sequence[Shape] = ()) -> Task:
        space = self.space_of(shape, inputs)
        sizes = sizes_of_images(inputs, space)
        # Where images differ in size, it is unknown which of them has the targets.
        if len(sizes) != 1:
            return replace(self, space=space)
        image = sizes.pop()
        answer = tuple(shape[-space:])
        return replace(self, space=space, example_sizes=(image, answer))

    def space_of(self, shape: Shape, inputs: Sequence[Shape]) -> int:
        """Return the number of axes of space of an output, given the shapes of its inputs."""
        return len(shape) - 2

    def num_outputs(self, shape: Shape) -> int:
        return int(shape[1])

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        has_axes_of_space = len(shape) - 2 in AXES
        return has_axes_of_space and num_outputs in (None, self.num_outputs(shape))

    def fits(self, shape: Shape, output: Shape) -> bool:
        # A block has a resolution of its own, and may score the tokens of a grid.
        if tuple(shape) == tuple(output):
            return True
        has_axes = len(shape) == self.space + 2 or self._is_of_tokens(shape)
        return has_axes and tuple(shape[:2]) == (output[0], self.num_outputs(output))

    def _is_of_tokens(self, shape: Shape) -> bool:
        """Return whether values of a shape are tokens, where the output is of images."""
        return self.space == 2 and len(shape) == 3

    def why_not_scored(
        self, shape: Shape, channel_axis: int, output: Shape, maps: Maps = tuple
    ) -> str:
        if len(shape) == self.space + 2:
            return ""
        are_tokens = self._is_of_tokens(shape) and channel_axis == 2
        if are_tokens and grid_of(shape[1], output[-self.space :]) in maps():
            return ""
        return "its value does not have the axes of space that the goodness of a pixel needs"

    def aligned(self, scores: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        output = scores[-1]
        size = output.shape[-self.space :]
        resized = [self.resized(own, size) for own in scores[:-1]]
        return [*resized, output]

    def resized(self, scores: Tensor, size: torch.Size) -> Tensor:
        """Return scores at another size."""
        scores = self.on_map(scores, size)
        # An exporter passes proxies, which cannot be compared.
        if isinstance(scores, Tensor) and scores.shape[2:] == size:
            return scores
        return F.interpolate(scores, size=size, mode=INTERPOLATION[self.space], align_corners=False)

    def on_map(self, scores: Tensor, size: torch.Size) -> Tensor:
        """Return scores of a map, (B, N, ...), which targets of a size fit."""
        return on_grid(scores, size) if self.space == 2 else scores

    def sizes_of_targets(self, shapes: Sequence[Shape], of_answer: bool) -> set[tuple[int, ...]]:
        """Return the sizes that belong to those of an image or of an answer, by the example.

        Args:
            shapes: with the batch.
            of_answer: whether they are those of the model's output, or those of its inputs.
        """
        if not self.example_sizes:
            return set()
        image, answer = self.example_sizes
        before, after = (answer, image) if of_answer else (image, answer)
        sizes = set()
        for size in sizes_of_images(shapes, self.space):
            sizes |= _counterparts(size, before, after)
        return sizes


def sizes_of_images(shapes: Sequence[Shape], space: int) -> set[tuple[int, ...]]:
    """Return the sizes of the values among some, (B, C, ...), that have axes of space."""
    return {tuple(shape[2:]) for shape in shapes if len(shape) == space + 2}


def _counterparts(size: Shape, before: Shape, after: Shape) -> set[tuple[int, ...]]:
    """Return the sizes that may belong to a size, given a pair of sizes that belong together.

    A model without padding takes the same number of pixels from each image. A model with strides
    takes the same share.
    """
    moved = []
    scaled = []
    for length, old, new in zip(size, before, after, strict=True):
        moved.append(length + new - old)
        scaled.append(length * new // old)
    return {tuple(moved), tuple(scaled)}
