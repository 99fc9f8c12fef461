"""Unsupervised Forward-Forward (Hinton, arXiv 2212.13345, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sffx.blocks import Block, Input
from sffx.checks import positive_integer
from sffx.errors import InputError
from sffx.learning.norms import feature_norm
from sffx.learning.objectives.choices import require_choice, require_positive
from sffx.learning.objectives.goodness import SquaredLength, default_threshold, logistic_loss
from sffx.learning.objectives.mixing import mixed, require_pairs
from sffx.learning.objectives.probe import BlockProbe, ProbedHead, require_classes
from sffx.objective import Batch, Objective, Place
from sffx.tasks import Task


@dataclass(frozen=True)
class UnsupervisedForwardForward(Objective):
    """Forward-Forward without labels (arXiv 2212.13345, section 3.2).

    A step runs each image twice: as it is, the positive view, and mixed with another image of the
    batch, the negative view. The mix is `mask * x_i + (1 - mask) * x_j`. The mask is random bits,
    blurred with [1/4, 1/2, 1/4] in both directions, six times, and cut at 0.5. The goodness G of a
    block is the sum of squares of its output. A block's loss is the mean of `softplus(theta - G)`
    over positive and `softplus(G - theta)` over negative views. The next block reads the output at
    unit mean square.

    Since a block knows no classes, its head has a linear probe: a linear layer on the normalised
    output, with cross-entropy on the positive views. No gradient comes from the probe to the block.
    So labels train the probes and the classifier alone. In train mode a head returns G - theta and
    then the probe's logits, (rows, 1 + J); in eval mode the logits.

    A prediction is the mean of the probes' logits over all blocks but the first. A sum of linear
    layers is one linear layer on the concatenated outputs. So this is the published readout, a
    softmax on the normalised outputs of the last blocks, but for the training: here each block's
    share learns alone, and there all shares learn together. `sffx.LinearProbe` trains those.

    Attributes:
        reduction: whether G is the "sum" or the "mean" of the squares.
        threshold: theta; None takes the number of values for a sum, and 1 for a mean.
        regions: to which the probe pools images, along each axis of space.
    """

    reduction: Literal["sum", "mean"] = "sum"
    threshold: float | None = None
    regions: int = 2

    name: ClassVar[str] = "ff-unsupervised"
    goodness: ClassVar[str | None] = None
    norm: ClassVar[str] = "length"
    skips: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_choice("reduction", self.reduction, ("sum", "mean"))
        if self.threshold is not None:
            require_positive("threshold", self.threshold)
        positive_integer("regions", self.regions)

    @property
    def views(self) -> int:
        return 2

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        require_classes(self, task)
        first = inputs[0]
        if not first.is_float or len(first.shape) != 3:
            raise InputError(
                f"the objective {self.name!r} mixes images, float (C, H, W), but the input "
                f"{first.name!r} is {first.dtype} of shape {first.shape}. Hint: objective='scff' "
                "takes any floats; a model that begins with Flatten takes images"
            )

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        is_mean = self.reduction == "mean"
        threshold = self.threshold
        if threshold is None:
            threshold = default_threshold(block, is_mean)
        probe = BlockProbe(block, num_classes, self.regions, feature_norm(self.norm))
        return ProbedHead(SquaredLength(is_mean, threshold), probe)

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (1 + num_classes,)

    def training_views(self, batch: Batch) -> Mapping[str, Any]:
        name, x = next(iter(batch.inputs.items()))
        require_pairs(len(x), self.name)
        return {**batch.repeated(self.views), name: torch.cat([x, mixed(x)])}

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        positive, negative = scores.chunk(2)
        of_probe = place.task.loss(positive[:, 1:], y)
        return logistic_loss(positive[:, 0], negative[:, 0]) + of_probe

    def classifier_loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        return place.task.loss(scores.chunk(2)[0], y)
