"""Supervised Forward-Forward (Hinton, arXiv 2212.13345)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block
from sffx.learning.objectives.choices import (
    require_choice,
    require_not_negative,
    require_positive,
)
from sffx.learning.objectives.goodness import (
    PeerActivity,
    SquaredLength,
    default_threshold,
    logistic_loss,
)
from sffx.learning.objectives.labelled import LabelledInput
from sffx.objective import Place


@dataclass(frozen=True)
class ForwardForward(LabelledInput):
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
        neutral: whether a third view, with a neutral label, trains the model's own classifier.
            Otherwise the classifier stays as it is, and does not run in a step.
        reduction: whether G is the "sum" or the "mean" of the squares. Take the mean for images:
            their sum is in the thousands, and the loss of a wrong view as well.
        threshold: theta; None takes the number of values for a sum, and 1 for a mean.
        loss_form: "logistic", as above; or "symba", `softplus(-alpha (G+ - G-))` of each pair,
            which needs no threshold (arXiv 2303.08418, equation 4).
        alpha: of SymBa.
        peer: factor of peer normalisation, a loss which is large where some units are always and
            others never active (`PeerActivity`). 0 leaves it out. A known reimplementation, with
            1.45 % error on MNIST, takes 0.03 (github.com/loeweX/Forward-Forward).
    """

    reduction: Literal["sum", "mean"] = "sum"
    threshold: float | None = None
    loss_form: Literal["logistic", "symba"] = "logistic"
    alpha: float = 4.0
    peer: float = 0.0

    name: ClassVar[str] = "ff"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("reduction", self.reduction, ("sum", "mean"))
        require_choice("loss_form", self.loss_form, ("logistic", "symba"))
        if self.threshold is not None:
            require_positive("threshold", self.threshold)
        require_positive("alpha", self.alpha)
        require_not_negative("peer", self.peer)

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        is_mean = self.reduction == "mean"
        threshold = self.threshold
        if threshold is None:
            threshold = default_threshold(block, is_mean)
        peers = None
        if self.peer:
            peers = PeerActivity(block.channels, block.channel_axis, self.views)
        return SquaredLength(is_mean, threshold, self.tries(num_classes), peers)

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (2,) if self.peer else (1,)

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        positive, negative = self.goodness_of_views(scores, len(y))
        if self.loss_form == "symba":
            loss = F.softplus(self.alpha * (negative - positive)).mean()
        else:
            loss = logistic_loss(positive, negative)
        if self.peer:
            # Each row holds the same number.
            loss = loss + self.peer * scores[:, 1].mean()
        return loss
