"""Self-Contrastive Forward-Forward (SCFF, arXiv 2409.11593)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block, Input
from sffx.checks import is_number, positive_integer, require_flag
from sffx.errors import InputError
from sffx.learning.norms import feature_norm
from sffx.learning.objectives.choices import require_natural, require_not_negative
from sffx.learning.objectives.mixing import moved, others_of, require_pairs
from sffx.learning.objectives.probe import BlockProbe, ProbedHead, require_classes
from sffx.objective import Batch, Objective, Place
from sffx.parts import index_of, is_block
from sffx.tasks import Task

# The first block sums a pair, and the view is its mean. So its output is half as large.
PAIR = 2


class PairGoodness(nn.Module):
    """What SCFF learns from: `softplus(theta+ - g)`, `softplus(g - theta-)`, `penalty * |g|`.

    The goodness g of a position is the mean of squares over its channels. The first two columns
    are means over positions, and |g| is the length of g as a vector of positions. A flat value has
    one position.

    Args:
        channel_axis: axis of the channels in the batched output.
        positive: theta+.
        negative: theta-.
        penalty: lambda.
        scale: factor of the output.
        rectifies: whether negative values of the output count as zero.
    """

    def __init__(
        self,
        channel_axis: int,
        positive: float,
        negative: float,
        penalty: float,
        scale: int,
        rectifies: bool = False,
    ) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.positive = positive
        self.negative = negative
        self.penalty = penalty
        self.scale = scale
        self.rectifies = rectifies

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the three columns, (N, 3).

        Args:
            y: the output of a block, (N, ...).
            mask: always None, since samples with padding are refused.
        """
        if self.rectifies:
            y = F.relu(y)
        goodness = (self.scale * y).square().mean(self.channel_axis).reshape(len(y), -1)
        too_small = F.softplus(self.positive - goodness).mean(1)
        too_large = F.softplus(goodness - self.negative).mean(1)
        length = torch.linalg.vector_norm(goodness, dim=1)
        return torch.stack([too_small, too_large, self.penalty * length], dim=1)

    def extra_repr(self) -> str:
        return f"positive={self.positive}, negative={self.negative}, penalty={self.penalty}"


class Triangle(nn.Module):
    """A ReLU behind a subtracted mean: `relu(y - mean of y over the channels)`."""

    def forward(self, y: Tensor) -> Tensor:
        """Return the part of y above its mean, (N, C, ...)."""
        return F.relu(y - y.mean(1, keepdim=True))


class Standardized(nn.Module):
    """In eval mode, gives each sample a mean of 0 and a variance of 1.

    In train mode the input stays as it is, since the views are standardised before.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x, (B, ...)."""
        return x if self.training else standardized(x)


def standardized(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Return samples with a mean of 0 and a variance of 1 each, (B, ...)."""
    flat = x.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return (centred / (flat.std(1, keepdim=True) + eps)).reshape(x.shape)


@dataclass(frozen=True)
class SCFF(Objective):
    """Self-Contrastive Forward-Forward (arXiv 2409.11593), which learns without labels.

    The positive view of a sample is the pair (x_i, x_i), the negative one (x_i, x_j) with another
    sample of the batch. The first layer treats both halves with the same weights and adds them.
    The goodness g of a position is the mean of squares over the channels. A block's loss is

        mean softplus(theta+ - g+) + mean softplus(g- - theta-) + lambda * mean_n |g+_n|

    with means over samples and positions, and with |g+_n| the length of a sample's goodness over
    positions. In a layer, `W x_i + b + W x_j + b` is twice `W (x_i + x_j) / 2 + b`. So a view is
    the mean of its pair, and the first block's output counts twice in its goodness. This is exact
    where the block is one linear layer or convolution with ReLU or max-pooling behind it. Samples
    are standardised first, each by itself, as is what a block hands on. At prediction the input is
    the positive pair, so a sample runs once.

    In the authors' code, a layer has a flag that pairs anew what it reads
    (github.com/neurophysics-cnrsthales/contrastive-forward-forward). On MNIST and in the first two
    layers on CIFAR-10 pairs are made of the input alone, as here. The last layer on CIFAR-10 pairs
    the second layer's outputs, which is not done here. The authors square the output before the
    pooling, here the block's output counts as it is. They train one block after the other
    (`sffx.BlockSchedule.greedy`). In their code each half of a pair is moved by itself, by up to
    two pixels on MNIST: `shift=2`.

    What a layer hands on is the "triangle" in their code, a ReLU behind a subtracted mean over
    channels. But its goodness is that of a plain ReLU. One block cannot have both as its output.
    So cut in front of the ReLU, and pass `triangle=True`: the goodness rectifies the output, and
    the layer norm behind the cut subtracts the mean before the next block's ReLU. It subtracts the
    mean over all values of a sample, which is theirs where an output is flat.

    Each block has a linear probe, as in `UnsupervisedForwardForward`, and the prediction is the
    mean of their logits. In train mode a head returns the three terms of the loss and then the
    probe's logits, (rows, 3 + J); in eval mode the logits.

    Attributes:
        positive_threshold: theta+, a number or one for each block. The authors have 4 and 1 on
            MNIST, 0, 5 and 6 on CIFAR-10.
        negative_threshold: theta-; 6 and 1, and 1, 9 and 10.
        penalty: lambda; 1e-4 and 0, and 1.2e-3, 7e-4 and 5e-4.
        standardize: whether the inputs are standardised. If not, the loader should do it.
        shift: by how many pixels each half of a pair is moved at most, in training. It needs
            images, (C, H, W).
        triangle: whether blocks end in front of their ReLU. Goodness is then that of `relu(y)`, and
            probes read `relu(y - mean of y over the channels)`.
        regions: to which the probe pools images, along each axis of space.
    """

    positive_threshold: float | tuple[float, ...] = 4.0
    negative_threshold: float | tuple[float, ...] = 6.0
    penalty: float | tuple[float, ...] = 1e-4
    standardize: bool = True
    shift: int = 0
    triangle: bool = False
    regions: int = 2

    name: ClassVar[str] = "scff"
    goodness: ClassVar[str | None] = None
    norm: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        for option in _OF_BLOCKS:
            value = getattr(self, option)
            if isinstance(value, list):
                # A frozen dataclass must be hashable.
                object.__setattr__(self, option, tuple(value))
            _require_numbers(option, value)
        require_flag("standardize", self.standardize)
        require_flag("triangle", self.triangle)
        require_natural("shift", self.shift)
        positive_integer("regions", self.regions)

    @property
    def views(self) -> int:
        return 2

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        require_classes(self, task)
        first = inputs[0]
        if not first.is_float:
            raise InputError(
                f"the objective {self.name!r} takes the mean of two samples, but the input "
                f"{first.name!r} holds {first.dtype}, not floats. Hint: objective='sff'"
            )
        if self.shift and (len(first.shape) != 3 or self.shift >= min(first.shape[1:])):
            raise InputError(
                f"shift is {self.shift}, which moves images, (C, H, W), by less than their height "
                f"and width, but the input {first.name!r} has the shape {first.shape}. "
                "Hint: shift=0; a model that begins with Flatten takes images"
            )
        masks = [each.name for each in inputs if each.marks_tokens]
        if masks:
            raise InputError(
                f"the objective {self.name!r} takes the mean of two samples, which have other "
                f"padding each, as {masks[0]!r} says. Hint: objective='ff' or 'sff', or a model "
                "of samples of one length, without a mask"
            )
        if self.standardize and math.prod(first.shape) < 2:
            raise InputError(
                f"the objective {self.name!r} standardises each sample, but one of {first.name!r} "
                f"has {math.prod(first.shape)} value, {first.shape}. Hint: standardize=False"
            )

    def require_blocks(self, blocks: int) -> None:
        for option in _OF_BLOCKS:
            value = getattr(self, option)
            if isinstance(value, tuple) and len(value) != blocks:
                raise InputError(
                    f"{option} holds {len(value)} numbers, but there are {blocks} blocks. "
                    "Hint: one number for each block, or one for all"
                )

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        # A policy may ask for the head of a block that it only considers.
        index = index_of(block.target) if is_block(block.target) else 0
        goodness = PairGoodness(
            block.channel_axis,
            _of_block(self.positive_threshold, index),
            _of_block(self.negative_threshold, index),
            _of_block(self.penalty, index),
            scale=PAIR if index == 0 else 1,
            rectifies=self.triangle,
        )
        norm = feature_norm(self.norm)
        activation = self.probe_activation()
        probe = BlockProbe(block, num_classes, self.regions, norm, activation=activation)
        return ProbedHead(goodness, probe)

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (3 + num_classes,)

    def training_views(self, batch: Batch) -> Mapping[str, Any]:
        name, given = next(iter(batch.inputs.items()))
        require_pairs(len(given), self.name)
        first = self._half(given)
        second = self._half(given) if self.shift else first
        pairs = torch.cat([first + second, first + others_of(second)]) / PAIR
        return {**batch.repeated(self.views), name: pairs}

    def _half(self, x: Tensor) -> Tensor:
        """Return one half of each pair, (B, ...)."""
        if self.shift:
            x = moved(x, self.shift)
        return standardized(x) if self.standardize else x

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        positive, negative = scores.chunk(2)
        of_goodness = positive[:, 0].mean() + negative[:, 1].mean() + positive[:, 2].mean()
        return of_goodness + place.task.loss(positive[:, 3:], y)

    def classifier_loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        return place.task.loss(scores.chunk(2)[0], y)

    def trials(self, inputs: Sequence[Input], num_classes: int) -> Mapping[str, nn.Module]:
        return {inputs[0].name: Standardized()} if self.standardize else {}

    def feature_inputs(self, inputs: Mapping[str, Any], num_classes: int) -> Mapping[str, Any]:
        if not self.standardize:
            return inputs
        name, x = next(iter(inputs.items()))
        return {**inputs, name: standardized(x)}

    def probe_activation(self) -> nn.Module | None:
        return Triangle() if self.triangle else None


# The options that may differ by block.
_OF_BLOCKS = ("positive_threshold", "negative_threshold", "penalty")


def _of_block(option: float | tuple[float, ...], index: int) -> float:
    return option[min(index, len(option) - 1)] if isinstance(option, tuple) else option


def _require_numbers(option: str, value: Any) -> None:
    if is_number(value):
        require_not_negative(option, value)
        return
    if not isinstance(value, (tuple, list)) or not value:
        raise InputError(
            f"{option} is {value!r}. Hint: pass a number, or a tuple with one for each block"
        )
    for each in value:
        require_not_negative(option, each)
