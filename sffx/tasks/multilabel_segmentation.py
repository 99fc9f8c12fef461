"""Labels of pixels, each of which a pixel has or has not: masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sffx.tasks.dense import Dense
from sffx.tasks.labels import MultiLabel
from sffx.tasks.task import Sums


@dataclass(frozen=True)
class MultiLabelSegmentation(Dense, MultiLabel):
    """Masks: a pixel has each of several labels or has it not. One label is foreground.

    The model's output is logits (B, J, H, W), and y is 0 and 1 of the same shape; with volumes
    (B, J, D, H, W), with signals (B, J, T). With one label, y may lack its axis, (B, H, W), and so
    may the output. Classes of which a pixel has exactly one are `Segmentation`.

    The scores of a block are logits at its own resolution, goodness minus a threshold:
    `s[n, j, p] = (conv_k(Y)[n, j, p])^2 - theta_j`, as of `MultiLabel`. The loss of a block is
    binary cross-entropy, the mean over pixels and labels. Where scores and y differ in size, the
    finer of the two is averaged: y is then the share of the pixels that have the label.

    In train mode the net returns a tuple, in which each block has its own resolution. In eval mode
    the logits are enlarged to the size of the answer, and the ensemble is their mean.

    `sffx.evaluate` enlarges the scores to y. It reports what `MultiLabel` reports of all pixels,
    where F1 is the Dice coefficient, and the mean of IoU over the labels ("mean_iou"). By label it
    reports IoU, which is 0 for a label that is neither there nor predicted.

    With `skip_nan`, labels that are nan are left out. Where a block is coarser than y, it learns
    the share of those pixels that count.
    """

    name: ClassVar[str] = "multilabel-segmentation"
    form: ClassVar[str] = "mask"
    outputs: ClassVar[str] = "labels"
    what: ClassVar[str] = "labels"
    task_of_sample: ClassVar[str] = "MultiLabel"
    shares: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "f1_micro", "mean_iou")

    def check_values(self, y: Tensor) -> None:
        self.require_shares(y)

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        return super().log_likelihoods(*self._rows_of_pixels(scores, y))

    def metrics(self, sums: Sums) -> dict[str, float]:
        metrics = super().metrics(sums)
        loss = metrics.pop("loss")
        return {**metrics, "mean_iou": float(_iou(sums).mean()), "loss": loss}

    def by_class(self, sums: Sums) -> tuple[float, ...]:
        return tuple(_iou(sums).tolist())


def _iou(sums: Sums) -> Tensor:
    """Return the intersection over the union of each label, (J,)."""
    found = sums["found"].double()
    union = (sums["predicted"] + sums["there"]).double() - found
    return found / union.clamp(min=1)
