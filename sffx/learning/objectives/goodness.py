"""The goodness of Forward-Forward: how long the output of a block is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block
from sffx.kernels.precision import full_precision, widened

# What the running mean of a unit's activity keeps of itself in a step, and its first value.
PEER_MOMENTUM = 0.9
PEER_START = 0.5


class SquaredLength(nn.Module):
    """`G = sum of y^2`, or the mean, over all axes but the batch; minus a threshold.

    Args:
        mean: whether the mean is taken.
        threshold: theta, which is subtracted.
        tries: rows of a prediction for each sample; the last of them has no score.
        peers: what tells how unequal the units of the block are, if that is a part of the loss.
    """

    def __init__(
        self, mean: bool, threshold: float, tries: int = 1, peers: PeerActivity | None = None
    ) -> None:
        super().__init__()
        self.mean = mean
        self.threshold = threshold
        self.tries = tries
        self.peers = peers

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `G - theta`: (N, 1) in train mode, and (N / tries, tries - 1) in eval mode.

        With peers it is (N, 2) in train mode, and the second column is their loss.

        Args:
            y: the output of a block, (N, ...).
            mask: (N, T) where y is (N, T, C), nonzero at real tokens, which alone count.
        """
        with full_precision(y):
            wide = widened(y)
            goodness = squared_length(wide, mask, self.mean) - self.threshold
            if not self.training:
                return by_label(goodness, self.tries)
            if self.peers is None:
                return goodness[:, None]
            return torch.stack([goodness, self.peers(wide, mask).expand(len(y))], dim=1)

    def extra_repr(self) -> str:
        reduction = "mean" if self.mean else "sum"
        return f"{reduction}, threshold={self.threshold}"


class Length(nn.Module):
    """The length of a block's output, minus a threshold that learns.

    Args:
        threshold: theta before the first step.
        tries: rows of a prediction for each sample; the last of them has no score.
    """

    def __init__(self, threshold: float, tries: int) -> None:
        super().__init__()
        # Of one axis, since FSDP shards no scalars.
        self.threshold = nn.Parameter(torch.tensor([float(threshold)]))
        self.tries = tries

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the length minus theta: (N, 1), and (N / tries, tries - 1) in eval mode.

        Args:
            y: the output of a block, (N, ...).
            mask: (N, T) where y is (N, T, C), nonzero at real tokens, which alone count.
        """
        with full_precision(y):
            squares = squared_length(widened(y), mask, mean=False)
            # The root has no gradient at 0.
            length = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
            goodness = length - self.threshold.to(length.dtype)
        return goodness[:, None] if self.training else by_label(goodness, self.tries)

    def extra_repr(self) -> str:
        return f"tries={self.tries}"


class PeerActivity(nn.Module):
    """Peer normalisation: the units of a block shall be equally active on average.

    A running mean of each unit's activity is kept over positive rows. The loss is
    `mean over units of (mean over units of the running mean - running mean)^2`. It has a gradient
    by the present batch, which is a share of the running mean. A unit of a flat value is a value,
    one of an image or of tokens is a channel.

    Args:
        channels: the number of units.
        channel_axis: axis of the channels in the batched output.
        views: rows of a training step for each sample. The first of them are the positive rows.
    """

    running_mean: Tensor

    def __init__(self, channels: int, channel_axis: int, views: int) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.views = views
        self.register_buffer("running_mean", torch.full((channels,), PEER_START))

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar, and take the batch into the running mean.

        Args:
            y: the output of a block, (N, ...).
            mask: (N, T) where y is (N, T, C), nonzero at real tokens, which alone count.
        """
        samples = len(y) // self.views
        units = y[:samples].movedim(self.channel_axis, -1).flatten(0, -2)
        if mask is None:
            activity = units.mean(0)
        else:
            real = mask[:samples].bool().flatten()[:, None]
            activity = units.masked_fill(~real, 0).sum(0) / real.sum().clamp(min=1)
        kept = self.running_mean.to(activity.dtype) * PEER_MOMENTUM
        running_mean = kept + (1 - PEER_MOMENTUM) * activity
        self.running_mean.copy_(running_mean.detach())
        return (running_mean.mean() - running_mean).square().mean()


def squared_length(y: Tensor, mask: Tensor | None, mean: bool) -> Tensor:
    """Return the sum of squares of each row, or their mean, (N,).

    Args:
        y: the output of a block, (N, ...).
        mask: (N, T) where y is (N, T, C), nonzero at real tokens, which alone count.
        mean: whether the mean is taken.
    """
    squares = y.square()
    if mask is None:
        flat = squares.flatten(1)
        return flat.mean(1) if mean else flat.sum(1)
    real = mask.bool()[:, :, None]
    total = squares.masked_fill(~real, 0).sum((1, 2))
    if not mean:
        return total
    return total / (real.sum((1, 2)).clamp(min=1) * y.shape[2])


def logistic_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the loss of telling positive from negative rows by their goodness, a scalar.

    It is the mean of `softplus(-g+)` and of `softplus(g-)`, halved: binary cross-entropy with the
    goodness above its threshold as logits.

    Args:
        positive: goodness minus the threshold, (B,).
        negative: likewise.
    """
    return (F.softplus(-positive).mean() + F.softplus(negative).mean()) / 2


def by_label(goodness: Tensor, tries: int) -> Tensor:
    """Return the goodness with each label, (N / tries, tries - 1), of rows (N,).

    The rows of the last try have the neutral label, which is no class.
    """
    return goodness.reshape(tries, -1)[:-1].movedim(0, 1)


def default_threshold(block: Block, mean: bool) -> float:
    """Return the goodness of an output with a mean square of 1."""
    return 1.0 if mean else float(math.prod(block.shape))
