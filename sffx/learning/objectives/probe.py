"""A linear probe in the head of a block, for objectives without labels in the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block
from sffx.errors import InputError
from sffx.kernels.precision import full_precision, widened
from sffx.learning.pooling import features_of, num_features
from sffx.objective import Objective
from sffx.tasks import CLASSIFICATION, Task


class BlockProbe(nn.Module):
    """A linear layer on the pooled, normalised output of a block.

    Images and volumes are pooled to some regions along each axis of space. Tokens are averaged,
    flat values are taken as they are. Then the features of a sample are normalised.

    Args:
        block: whose output is read.
        num_classes: J.
        regions: along each axis of space of images and volumes.
        norm: of the features, (N, features).
        is_detached: whether the block gets no gradient from it.
    """

    def __init__(
        self,
        block: Block,
        num_classes: int,
        regions: int,
        norm: nn.Module,
        is_detached: bool = True,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.is_detached = is_detached
        self.activation = activation
        self.channel_axis = block.channel_axis
        self.spatial = len(block.shape) - 1
        self.regions = regions
        self.norm = norm
        features = num_features(block.channels, self.spatial, regions)
        self.linear = nn.Linear(features, num_classes)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits, (N, J).

        Args:
            y: the output of a block, (N, ...).
            mask: (N, T) where y is (N, T, C), nonzero at real tokens.
        """
        if self.is_detached:
            y = y.detach()
        channels_first = y.movedim(self.channel_axis, 1)
        if self.activation is not None:
            channels_first = self.activation(channels_first)
        pooled = features_of(channels_first, mask, self.spatial, self.regions)
        features = self.norm(pooled)
        weight = self.linear.weight.to(features.dtype)
        return F.linear(features, weight, self.linear.bias.to(features.dtype))


class ProbedHead(nn.Module):
    """A head that learns without labels, and a linear probe that tells the classes.

    In train mode it returns the columns that the objective learns from, and after them the logits
    of the probe. In eval mode it returns the logits alone, so a probe's logits are the scores of
    its block.

    Args:
        columns: from y and its mask, (N, columns).
        probe: of the same block.
    """

    def __init__(self, columns: nn.Module, probe: BlockProbe) -> None:
        super().__init__()
        self.columns = columns
        self.probe = probe

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (N, columns + J) in train mode, (N, J) in eval mode.

        Args:
            y: the output of a block, (N, ...).
            mask: (N, T) where y is (N, T, C), nonzero at real tokens.
        """
        with full_precision(y):
            wide = widened(y)
            logits = self.probe(wide, mask)
            if not self.training:
                return logits
            return torch.cat([self.columns(wide, mask), logits], dim=1)


def require_classes(objective: Objective, task: Task) -> None:
    """Raise an InputError if a model does not tell classes of a sample apart."""
    if task != CLASSIFICATION:
        raise InputError(
            f"the objective {objective.name!r} has probes for classes of a sample, not for "
            f"sffx.tasks.{task!r}. Hint: objective='sff'"
        )
