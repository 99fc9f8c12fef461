"""Classes of pixels, of voxels, or of the samples of a signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sffx.errors import InputError
from sffx.kernels.majority import majority_labels
from sffx.tasks.over_space import AXES, OverSpace, sizes_of_images
from sffx.tasks.positions import Positions
from sffx.tasks.task import Shape, Sums


@dataclass(frozen=True)
class Segmentation(OverSpace, Positions):
    """Classes of pixels. The model's output is logits (B, J, H, W), y is class indices (B, H, W).

    Each pixel has one class. Masks of 0 and 1, as of one logit, are `MultiLabelSegmentation`.

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
    """

    name: ClassVar[str] = "segmentation"
    form: ClassVar[str] = "pixel"
    outputs: ClassVar[str] = "classes of pixels"
    shares: ClassVar[tuple[str, ...]] = ("accuracy", "mean_iou")
    instead_of_one: ClassVar[str] = (
        "for a mask of 0 and 1 pass task=sffx.tasks.MultiLabelSegmentation(); for two classes, "
        "give it two logits"
    )

    @property
    def shapes(self) -> str:  # type: ignore[override]
        return f"(B, J, {AXES[self.space]})"

    def _target_axes(self) -> tuple[int, ...]:
        return (self.space + 1,)

    def _target_shapes(self, batch: int) -> str:
        return f"({batch}, {AXES[self.space]})"

    def require_size(self, y: Any, of_answer: bool, shapes: Sequence[Shape]) -> None:
        is_signal = self.space == 1  # which has a length alone
        if is_signal or not isinstance(y, Tensor) or y.ndim != self.space + 1:
            return
        # Labels have the size of the image or of the answer, which may differ.
        sizes = sizes_of_images(shapes, self.space)
        sizes |= self.sizes_of_targets(shapes, of_answer)
        size_of_labels = tuple(y.shape[1:])
        if size_of_labels in sizes:
            return
        whose = "scores" if of_answer else "input"
        for size in sorted(sizes):
            _require_fitting(size, size_of_labels, whose)

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        shape = (output[0], *output[2:])
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        scores = self.on_map(scores, y.shape[1:])
        size = tuple(scores.shape[2:])
        labels = majority_labels(y, size, scores.shape[1], self.ignore_index)
        return super().loss(scores, labels)

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        scores = self.on_map(scores, y.shape[1:])
        scores = self.resized(scores, y.shape[1:])
        return super().log_likelihoods(scores, y)

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        scores = self.on_map(scores, y.shape[1:])
        # At full size, so that blocks of different resolutions can be compared.
        scores = self.resized(scores, y.shape[1:])
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
