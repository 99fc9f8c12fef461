"""The Convolutional Forward-Forward Algorithm (CFFA, arXiv 2406.14038)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sffx.blocks import Block
from sffx.learning.objectives.choices import require_positive
from sffx.learning.objectives.goodness import Length, logistic_loss
from sffx.learning.objectives.labelled import LabelledInput
from sffx.objective import Place


@dataclass(frozen=True)
class CFFA(LabelledInput):
    """The Convolutional Forward-Forward Algorithm, as SaFF-Net uses it (arXiv 2406.14038).

    The output of a block is split in direction and length. The length is the goodness g, and the
    next block reads the direction (at unit mean square, as everywhere here). With a positive view,
    a sample with its label, and a negative one, with a wrong label, a block's loss is

        ( mean softplus(theta - g+) + mean softplus(g- - theta) ) / 2

    The threshold theta is a parameter of the block's head and learns with the block. The
    prediction takes the label with the largest sum of goodness over all blocks but the first.

    The paper's self-adapting choice of hyperparameters is not part of it. Where theta begins is
    not published; by default it is the length of an output at unit mean square.

    Attributes:
        labels: how a label is put into the first input: "pixels", its first J values; "waves", a
            wave over the whole image.
        negatives: how wrong labels are drawn: "uniform"; or "hard", by the scores that the net
            gives them, which costs a prediction in each step.
        neutral: whether a third view, with a neutral label, trains the model's own classifier.
            Otherwise the classifier stays as it is, and does not run in a step.
        threshold: theta before the first step; None takes the root of the number of values.
    """

    threshold: float | None = None

    name: ClassVar[str] = "cffa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            require_positive("threshold", self.threshold)

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        threshold = self.threshold
        if threshold is None:
            threshold = math.sqrt(math.prod(block.shape))
        return Length(threshold, self.tries(num_classes))

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        return logistic_loss(*self.goodness_of_views(scores, len(y)))
