"""Supervised Forward-Forward (Hinton, arXiv 2212.13345)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block, Input
from sffx.errors import InputError
from sffx.kernels.precision import full_precision, widened
from sffx.learning.objectives.labels import (
    LABEL_CODES,
    LabelTrials,
    LastTry,
    Repeated,
    likely_other_labels,
    other_labels,
)
from sffx.objective import Batch, Objective, Place
from sffx.tasks import CLASSIFICATION, Task


class SquaredLength(nn.Module):
    """`G = sum of y^2`, or the mean, over all axes but the batch; minus a threshold.

    Args:
        mean: whether the mean is taken.
        threshold: theta, which is subtracted.
        tries: rows of a prediction for each sample; the last of them has no score.
    """

    def __init__(self, mean: bool, threshold: float, tries: int) -> None:
        super().__init__()
        self.mean = mean
        self.threshold = threshold
        self.tries = tries

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `G - theta`: (N, 1) in train mode, and (N / tries, tries - 1) in eval mode.

        Args:
            y: the output of a block, (N, ...).
            mask: (N, T) where y is (N, T, C), nonzero at real tokens, which alone count.
        """
        with full_precision(y):
            goodness = self._goodness(widened(y), mask) - self.threshold
        if self.training:
            return goodness[:, None]
        return goodness.reshape(self.tries, -1)[:-1].movedim(0, 1)

    def _goodness(self, y: Tensor, mask: Tensor | None) -> Tensor:
        squares = y.square()
        if mask is None:
            flat = squares.flatten(1)
            return flat.mean(1) if self.mean else flat.sum(1)
        real = mask.bool()[:, :, None]
        total = squares.masked_fill(~real, 0).sum((1, 2))
        if not self.mean:
            return total
        return total / (real.sum((1, 2)).clamp(min=1) * y.shape[2])

    def extra_repr(self) -> str:
        reduction = "mean" if self.mean else "sum"
        return f"{reduction}, threshold={self.threshold}"


@dataclass(frozen=True)
class ForwardForward(Objective):
    """Forward-Forward with labels in the input (arXiv 2212.13345, section 3.3).

    A step runs each sample twice: with its label, the positive view, and with a wrong one, the
    negative view. The goodness G of a block is the sum of squares of its output. The probability
    that a view is positive is `sigmoid(G - theta)`, and a block's loss is the mean of
    `softplus(theta - G)` over positive and `softplus(G - theta)` over negative views. The next
    block reads the output at unit mean square.

    A prediction runs a sample with every label and takes the one with the most goodness, over all
    blocks but the first.

    Attributes:
        labels: how a label is put into the first input: "pixels", its first J values; "waves", a
            wave over the whole image.
        negatives: how wrong labels are drawn: "uniform"; or "hard", by the scores that the net
            gives them, which costs a prediction in each step.
        reduction: whether G is the "sum" or the "mean" of the squares.
        threshold: theta; None takes the number of values for a sum, and 1 for a mean.
        loss_form: "logistic", as above; or "symba", `softplus(-alpha (G+ - G-))` of each pair,
            which needs no threshold (arXiv 2303.08418, equation 4).
        alpha: of SymBa.
        neutral: whether a third view, with a neutral label, trains the model's own classifier.
            Otherwise the classifier stays as it is, and does not run in a step.
    """

    labels: Literal["pixels", "waves"] = "pixels"
    negatives: Literal["uniform", "hard"] = "uniform"
    reduction: Literal["sum", "mean"] = "sum"
    threshold: float | None = None
    loss_form: Literal["logistic", "symba"] = "logistic"
    alpha: float = 4.0
    neutral: bool = False

    name: ClassVar[str] = "ff"
    goodness: ClassVar[str | None] = None
    norm: ClassVar[str] = "length"
    skips: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _require_choice("labels", self.labels, LABEL_CODES)
        _require_choice("negatives", self.negatives, ("uniform", "hard"))
        _require_choice("reduction", self.reduction, ("sum", "mean"))
        _require_choice("loss_form", self.loss_form, ("logistic", "symba"))
        if self.threshold is not None:
            _require_positive("threshold", self.threshold)
        _require_positive("alpha", self.alpha)

    @property
    def views(self) -> int:
        return 3 if self.neutral else 2

    @property
    def trains_classifier(self) -> bool:
        return self.neutral

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        if task != CLASSIFICATION:
            raise InputError(
                f"the objective 'ff' learns classes of a sample, not sffx.tasks.{task!r}. "
                "Hint: objective='sff'"
            )
        first = inputs[0]
        if not getattr(torch, first.dtype).is_floating_point:
            raise InputError(
                f"the objective 'ff' puts labels into the input {first.name!r}, which holds "
                f"{first.dtype}, not floats. Hint: objective='sff'"
            )
        LABEL_CODES[self.labels].require(first.shape, num_classes)

    def notes(self) -> tuple[str, ...]:
        if self.neutral:
            return ()
        return (
            "the objective 'ff' leaves the classifier as it is; "
            "sffx.objectives.ForwardForward(neutral=True) trains it",
        )

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        threshold = self.threshold
        if threshold is None:
            threshold = 1.0 if self.reduction == "mean" else float(math.prod(block.shape))
        return SquaredLength(self.reduction == "mean", threshold, self.tries(num_classes))

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (1,)

    def check_targets(self, y: Any, batch: int, num_classes: int) -> None:
        CLASSIFICATION.check_labels(y, batch, num_classes)

    def training_views(self, batch: Batch) -> Mapping[str, Any]:
        name, x = next(iter(batch.inputs.items()))
        labels = LABEL_CODES[self.labels]
        codes = labels.codes(x.shape[1:], batch.num_classes).to(x.device, x.dtype)
        of_views = [codes[batch.y], codes[self._wrong_labels(batch)]]
        if self.neutral:
            of_views.append(codes[-1:].expand_as(of_views[0]))
        labelled = [labels.put(x, own) for own in of_views]
        views = {other: torch.cat([value] * self.views) for other, value in batch.inputs.items()}
        views[name] = torch.cat(labelled)
        return views

    def _wrong_labels(self, batch: Batch) -> Tensor:
        if self.negatives == "hard":
            return likely_other_labels(batch.y, batch.scores())
        return other_labels(batch.y, batch.num_classes)

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        positive, negative, *_ = scores.reshape(self.views, len(y))
        if self.loss_form == "symba":
            return F.softplus(self.alpha * (negative - positive)).mean()
        return (F.softplus(-positive).mean() + F.softplus(negative).mean()) / 2

    def classifier_loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        neutral = scores.reshape(self.views, len(y), -1)[-1]
        return place.task.loss(neutral, y)

    def tries(self, num_classes: int) -> int:
        return num_classes + 1

    def trials(self, inputs: Sequence[Input], num_classes: int) -> Mapping[str, nn.Module]:
        first, *others = inputs
        labels = LABEL_CODES[self.labels]
        modules: dict[str, nn.Module] = {}
        modules[first.name] = LabelTrials(labels, first.shape, num_classes)
        for other in others:
            modules[other.name] = Repeated(self.tries(num_classes))
        return modules

    def choice(self, num_classes: int) -> nn.Module | None:
        return LastTry(self.tries(num_classes))


def _require_choice(option: str, value: Any, known: Any) -> None:
    if value not in known:
        names = ", ".join(map(repr, known))
        raise InputError(f"{option} is {value!r}. Hint: choose one of {names}")


def _require_positive(option: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value > 0:
        raise InputError(f"{option} is {value!r}. Hint: pass a positive number")
