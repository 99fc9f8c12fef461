"""Classes of pixels, of voxels, or of the samples of a signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.kernels.majority import majority_labels
from sffx.tasks.grid import grid_of, on_grid
from sffx.tasks.positions import Positions
from sffx.tasks.task import Maps, Shape, Sums, Task

# By the number of axes of space: their names, and how scores are enlarged.
_AXES = {1: "T", 2: "H, W", 3: "D, H, W"}
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Segmentation(Positions):
    """Classes of pixels. The model's output is logits (B, J, H, W), y is class indices (B, H, W).

    With voxels these are (B, J, D, H, W) and (B, D, H, W), with a signal (B, J, T) and (B, T). Of a
    mapping such as torchvision's, the entry "out" is the output; "aux" is left out.

    The goodness of a block at a pixel is the square of its auxiliary convolution there, with no
    mean over space: `g[n, j, p] = (conv_k(Y)[n, j, p])^2`, at the block's own resolution. The loss
    of a block is cross-entropy with goodness as logits, the mean over the pixels of the batch whose
    label is not `ignore_index`. A batch of nothing else has a loss of 0.

    Tokens of a vision transformer, (B, N, C), are scored where they are the pixels of a map of the
    model, in a grid with the image's proportions: each token is a pixel of the block. A token of a
    class before them is left out. A kernel of more than one position runs along the tokens.

    Where scores and labels differ in size, the labels are brought to the size of the scores: a
    pixel of the block gets the label that most of its pixels have. It is left out unless a class is
    more frequent there than pixels that are left out. A loss of enlarged scores takes more time.
    Short runs did not settle which is more accurate (`examples/guides/tasks.md`).

    In train mode the net returns a tuple, in which each block has its own resolution. In eval mode
    goodness is upsampled to the classifier's size, which is the size of the answer.

    `sffx.evaluate` enlarges the scores to the labels. It reports the accuracy of pixels, the mean
    of IoU over the classes that occur or are predicted ("mean_iou"), and the IoU of each class
    (`by_class`, nan for a class that does neither). Its loss is of the enlarged scores as well.

    Attributes:
        ignore_index: the label of pixels that are left out.
        space: the number of axes of space: 2 of images, 3 of volumes, 1 of signals. `transform`
            sets it.
        example_sizes: of the image and of the answer in the example; () where they are not known.
            `transform` sets it.
    """

    space: int = 2
    example_sizes: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)

    name: ClassVar[str] = "segmentation"
    form: ClassVar[str] = "pixel"
    outputs: ClassVar[str] = "classes of pixels"
    shares: ClassVar[tuple[str, ...]] = ("accuracy", "mean_iou")

    @property
    def shapes(self) -> str:  # type: ignore[override]
        return f"(B, J, {_AXES[self.space]})"

    def settled(self, shape: Shape, inputs: Sequence[Shape] = ()) -> Task:
        space = len(shape) - 2
        sizes = _sizes_of_images(inputs, space)
        # Where images differ in size, it is unknown which of them has the labels.
        if len(sizes) != 1:
            return replace(self, space=space)
        image = sizes.pop()
        answer = tuple(shape[2:])
        return replace(self, space=space, example_sizes=(image, answer))

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        has_axes_of_space = len(shape) - 2 in _AXES
        return has_axes_of_space and num_outputs in (None, shape[1])

    def fits(self, shape: Shape, output: Shape) -> bool:
        # A block has a resolution of its own, and may score the tokens of a grid.
        has_axes = len(shape) == len(output) or self._is_of_tokens(shape)
        return has_axes and tuple(shape[:2]) == tuple(output[:2])

    def _is_of_tokens(self, shape: Shape) -> bool:
        """Return whether values of a shape are tokens, where the output is of images."""
        return self.space == 2 and len(shape) == 3

    def why_not_scored(
        self, shape: Shape, channel_axis: int, output: Shape, maps: Maps = tuple
    ) -> str:
        if len(shape) == len(output):
            return ""
        are_tokens = self._is_of_tokens(shape) and channel_axis == 2
        if are_tokens and grid_of(shape[1], output[2:]) in maps():
            return ""
        return "its value does not have the axes of space that the goodness of a pixel needs"

    def _target_axes(self) -> tuple[int, ...]:
        return (self.space + 1,)

    def _target_shapes(self, batch: int) -> str:
        return f"({batch}, {_AXES[self.space]})"

    def require_size(self, y: Any, of_answer: bool, shapes: Sequence[Shape]) -> None:
        is_signal = self.space == 1  # which has a length alone
        if is_signal or not isinstance(y, Tensor) or y.ndim != self.space + 1:
            return
        sizes = self._sizes_of_labels(shapes, of_answer)
        size_of_labels = tuple(y.shape[1:])
        if size_of_labels in sizes:
            return
        whose = "scores" if of_answer else "input"
        for size in sorted(sizes):
            _require_fitting(size, size_of_labels, whose)

    def _sizes_of_labels(self, shapes: Sequence[Shape], of_answer: bool) -> set[tuple[int, ...]]:
        """Return the sizes that labels may have: of the image, or of the answer, which may differ.

        Args:
            shapes: with the batch.
            of_answer: whether they are those of the model's output, or those of its inputs.
        """
        given = _sizes_of_images(shapes, self.space)
        if not self.example_sizes:
            return given
        image, answer = self.example_sizes
        before, after = (answer, image) if of_answer else (image, answer)
        sizes = set(given)
        for size in given:
            sizes |= _counterparts(size, before, after)
        return sizes

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        shape = (output[0], *output[2:])
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def aligned(self, scores: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        logits = scores[-1]
        size = logits.shape[2:]
        resized = [self._resized(own, size) for own in scores[:-1]]
        return [*resized, logits]

    def _resized(self, scores: Tensor, size: torch.Size) -> Tensor:
        """Return scores at another size."""
        if self.space == 2:
            scores = on_grid(scores, size)
        # An exporter passes proxies, which cannot be compared.
        if isinstance(scores, Tensor) and scores.shape[2:] == size:
            return scores
        return F.interpolate(scores, size=size, mode=INTERPOLATION[self.space], align_corners=False)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        scores = self._on_map(scores, y)
        size = tuple(scores.shape[2:])
        labels = majority_labels(y, size, scores.shape[1], self.ignore_index)
        return super().loss(scores, labels)

    def _on_map(self, scores: Tensor, y: Tensor) -> Tensor:
        """Return scores of a map, (B, J, ...), which the labels fit."""
        return on_grid(scores, y.shape[1:]) if self.space == 2 else scores

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        scores = self._on_map(scores, y)
        scores = self._resized(scores, y.shape[1:])
        return super().log_likelihoods(scores, y)

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        scores = self._on_map(scores, y)
        # At full size, so that blocks of different resolutions can be compared.
        scores = self._resized(scores, y.shape[1:])
        num_classes = scores.shape[1]
        is_counted = y != self.ignore_index
        predicted = scores.argmax(dim=1)
        # A pair of a label and a prediction, as one number.
        pairs = y[is_counted] * num_classes + predicted[is_counted]
        confusion = torch.bincount(pairs, minlength=num_classes**2)
        return {**super().sums(scores, y), "confusion": confusion}

    def metrics(self, sums: Sums) -> dict[str, float]:
        means = self.mean_metrics(sums)
        mean_iou = float(_iou(sums["confusion"]).nanmean())
        return {"accuracy": means["accuracy"], "mean_iou": mean_iou, "loss": means["loss"]}

    def by_class(self, sums: Sums) -> tuple[float, ...]:
        return tuple(_iou(sums["confusion"]).tolist())


def _sizes_of_images(shapes: Sequence[Shape], space: int) -> set[tuple[int, ...]]:
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


def _require_fitting(size: Shape, size_of_labels: Shape, whose: str) -> None:
    """Raise an InputError if labels are off by a pixel along one axis, or turned.

    Turned labels fit only with height and width exchanged. Without this check, such labels would be
    brought to the size of the scores, as any others are.

    Args:
        size: of the image or of the answer.
        size_of_labels: which is another one.
        whose: size it is, for the message.
    """
    difference = f"y has {_in_words(size_of_labels)} pixels, but the {whose} {_in_words(size)}"
    differences = []
    for length, length_of_labels in zip(size, size_of_labels, strict=True):
        if length != length_of_labels:
            differences.append(abs(length - length_of_labels))
    if differences == [1]:
        raise InputError(f"{difference}. Hint: labels of the size of the image")
    *_, height, width = size
    *_, rows, columns = size_of_labels
    fits = _is_multiple(rows, columns, height, width)
    fits_turned = _is_multiple(rows, columns, width, height)
    if fits_turned and not fits and height != width:
        raise InputError(f"{difference}. Hint: the height comes first, y.mT")


def _is_multiple(rows: int, columns: int, height: int, width: int) -> bool:
    """Return whether both axes of labels are the same multiple of a height and a width."""
    if rows % height or columns % width:
        return False
    return rows // height == columns // width


def _in_words(size: Shape) -> str:
    return " x ".join(map(str, size))


def _iou(confusion: Tensor) -> Tensor:
    """Return the intersection over the union of each class, (J,), nan where there is no union."""
    num_classes = int(len(confusion) ** 0.5)
    counts = confusion.reshape(num_classes, num_classes).double()  # (label, prediction)
    intersection = counts.diagonal()
    predicted = counts.sum(0)
    labelled = counts.sum(1)
    return intersection / (predicted + labelled - intersection)
