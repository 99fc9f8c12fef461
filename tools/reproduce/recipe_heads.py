"""The heads of the recipes: the head of `mlp`, with what a recipe puts before or beside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.learning.norms import SampleNorm

mlp = partial(sffx.named_head, "mlp")


class ColumnHead(nn.Module):
    """A head with one more column in train mode: what the recipe adds to the loss of a sample."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def goodness(self, y: Tensor) -> Tensor:
        """Return the goodness, (B, J)."""
        goodness: Tensor = self.head(y)
        return goodness

    def column(self, y: Tensor) -> Tensor:
        """Return the column, (B,)."""
        raise NotImplementedError

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness, (B, J), in train mode with the column, (B, J + 1)."""
        goodness = self.goodness(y)
        if not self.training:
            return goodness
        return torch.cat([goodness, self.column(y)[:, None]], dim=1)


class TransportHead(ColumnHead):
    """Its column is how far its block moves its input.

    The column is `mean (T(x) - x)^2`, over the values of a sample. It is 0 where a block changes
    the shape. A head does not see the input of its block, so a hook on the block remembers it.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__(head)
        self.read: Tensor | None = None

    def remember(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Keep what a block reads, x, for a step of training; a forward pre-hook."""
        self.read = inputs[0] if self.training else None

    def column(self, y: Tensor) -> Tensor:
        read, self.read = self.read, None
        if read is None or read.shape != y.shape:
            return y.new_zeros(len(y))
        return (y - read).square().flatten(1).mean(1)


class GroupedHead(nn.Module):
    """A head that tells groups of classes apart.

    The score of a class is the log of its group's mean probability. So cross-entropy of the scores
    is that of the summed probability of the label's group, but for a constant. In the ensemble, the
    block does not choose between the classes of a group.

    Attributes:
        group_of: the group of each class, (J,). At first each class is its own.
    """

    group_of: Tensor

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("group_of", torch.arange(num_classes))

    def forward(self, y: Tensor) -> Tensor:
        """Return the score of each class, (B, J)."""
        is_same = self.group_of[:, None] == self.group_of
        logits = self.head(y)[:, None].masked_fill(~is_same, -math.inf)  # (B, J, J)
        return logits.logsumexp(2) - is_same.sum(1).log()


class MomentumHead(nn.Module):
    """A head behind a slow copy of the first layer of the next block, and a bias that learns."""

    def __init__(self, layer: nn.Module, block: sffx.Block, num_classes: int) -> None:
        super().__init__()
        self.norm = SampleNorm()  # as the next block reads its input
        self.layer = copy.deepcopy(layer).requires_grad_(False)
        channels: Any = layer.out_channels
        self.bias = nn.Parameter(torch.zeros(channels))
        self.head = mlp(block, num_classes, channels=channels)

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness, (B, J), of a block's output, (B, C, H, W)."""
        hidden = self.layer(self.norm(y)) + self.bias[:, None, None]
        goodness: Tensor = self.head(F.relu(hidden))
        return goodness

    @torch.no_grad()
    def follow(self, layer: nn.Module, momentum: float) -> None:
        """Move the copy: `w <- m w + (1 - m) w_next`."""
        for own, other in zip(self.layer.parameters(), layer.parameters(), strict=True):
            own.lerp_(other, 1 - momentum)


class DeepHead(nn.Module):
    """A head behind copies of later blocks, which learn with it."""

    def __init__(self, layers: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        self.norm = SampleNorm()  # as between blocks
        self.head = head

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness, (B, J), of a block's output, (B, C, H, W)."""
        for layer in self.layers:
            y = layer(self.norm(y))
        goodness: Tensor = self.head(y)
        return goodness


class ReconstructionHead(ColumnHead):
    """Its column is how badly a decoder restores the image.

    That is the cross-entropy of the pixels, averaged over an image and weighted. The decoder
    is a convolution to 12 channels, a BN, a ReLU, and a convolution to the pixels.

    Attributes:
        weight: of the column.
        share: of the gradient of the goodness that the block gets. The head itself gets all.
        mean: of the images by channel, from 0 to 255, which was subtracted from them.
        std: by which they were divided.
    """

    HIDDEN = 12
    mean: Tensor
    std: Tensor

    def __init__(self, block: sffx.Block, num_classes: int, size: int) -> None:
        super().__init__(mlp(block, num_classes))
        # Pixels of the block's positions. The authors enlarge the features first, at many times
        # the operations.
        factor = size // block.shape[-1]
        self.decoder = nn.Sequential(
            nn.Conv2d(block.channels, self.HIDDEN, 3, padding=1),
            nn.BatchNorm2d(self.HIDDEN),
            nn.ReLU(),
            nn.Conv2d(self.HIDDEN, 3 * factor**2, 1),
            nn.PixelShuffle(factor),
        )
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.full((3,), 255.0))
        self.image: Tensor | None = None
        self.weight = 0.0
        self.share = 1.0

    def show(self, x: Tensor) -> None:
        """Keep the images of the next step, (B, 3, H, W), as the network reads them."""
        self.image = (x * self.std[:, None, None] + self.mean[:, None, None]) / 255

    def goodness(self, y: Tensor) -> Tensor:
        return super().goodness(torch.lerp(y.detach(), y, self.share))

    def column(self, y: Tensor) -> Tensor:
        image, self.image = self.image, None
        if self.weight == 0 or image is None:
            return y.new_zeros(len(y))
        pixels = F.binary_cross_entropy_with_logits(self.decoder(y), image, reduction="none")
        return self.weight * pixels.flatten(1).mean(1)


class ContrastHead(nn.Module):
    """A head with 128 more columns in train mode: projected features of unit length.

    The features are averaged over space. They are divided by the root of the temperature, so that
    their products are similarities over the temperature.
    """

    SIZE = 128
    temperature: Tensor

    def __init__(self, block: sffx.Block, num_classes: int) -> None:
        super().__init__()
        self.head = mlp(block, num_classes)
        self.projection = nn.Linear(block.channels, self.SIZE)
        self.norm = nn.BatchNorm1d(self.SIZE)
        self.register_buffer("temperature", torch.tensor(0.8))

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness, (B, J), in train mode with the features, (B, J + 128)."""
        goodness: Tensor = self.head(y)
        if not self.training:
            return goodness
        features = self.norm(self.projection(y.flatten(2).mean(2)))
        unit = F.normalize(features) * self.temperature.rsqrt()
        return torch.cat([goodness, unit], dim=1)


def supervised_contrast(z: Tensor, y: Tensor) -> Tensor:
    """Return the mean over samples of `-mean_p log( exp(z_n z_p) / sum_{a != n} exp(z_n z_a) )`.

    The p are the other samples of the same class. Samples without any are left out.

    Args:
        z: features over the root of the temperature, (B, D).
        y: class indices, (B,).
    """
    itself = torch.eye(len(y), dtype=torch.bool)
    log_shares = (z @ z.T).masked_fill(itself, -math.inf).log_softmax(1)
    positive = (y[:, None] == y) & ~itself
    counts = positive.sum(1)
    sums = log_shares.masked_fill(~positive, 0).sum(1)
    means = sums / counts.clamp(min=1)
    return -means.sum() / (counts > 0).sum().clamp(min=1)
