"""The heads of positions: the goodness at each pixel or token, with no mean over them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.kernels.by_rows import by_rows
from sffx.kernels.padding import windows, zero_padded
from sffx.kernels.precision import full_precision, widened
from sffx.kernels.squares import squared_linear

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class PositionGoodness(nn.Module):
    """`g[n, j, p] = (conv_k(Y)[n, j, p])^2` at a position p: the paper's goodness without its mean.

    The scores have the classes where the block has its channels: (B, J, H, W) for a map, (B, T, J)
    for tokens.

    Args:
        channels: C of the block's output.
        num_classes: J.
        channel_axis: axis of the channels in the batched output, as in `SFFGoodness`.
        spatial: number of axes besides batch and channels.
        kernel_size: k of the convolution, odd. The input is padded with zeros.
        classes_last: whether the scores are (B, T, J), and not (B, J, ...).

    Attributes:
        weight: (J, C, k, ...), initialised as that of a `torch.nn` convolution.
        bias: (J,).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        channel_axis: int,
        spatial: int,
        kernel_size: int = 1,
        *,
        classes_last: bool,
    ) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.spatial = spatial
        self.kernel_size = kernel_size
        self.classes_last = classes_last
        self.weight = nn.Parameter(torch.empty(num_classes, channels, *[kernel_size] * spatial))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `torch.nn` convolutions do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness at each position, in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. A kernel reads zeros at the
                others, as beyond the ends of the sequence.
        """
        with full_precision(y):
            wide = widened(y)
            weight = self.weight.to(wide.dtype)
            bias = self.bias.to(wide.dtype)
            if self.classes_last:
                return self._of_tokens(wide.movedim(self.channel_axis, 2), weight, bias, mask)
            # A kernel of one position in a map whose channels are last is a linear layer.
            if self.kernel_size == 1 and self.channel_axis == wide.ndim - 1:
                return F.linear(wide, weight.flatten(1), bias).square().movedim(-1, 1)
            maps = wide.movedim(self.channel_axis, 1)
            convolve = _CONVOLUTIONS[self.spatial]
            return convolve(maps, weight, bias, padding=self.kernel_size // 2).square()

    def _of_tokens(self, y: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Return the goodness (B, T, J) of y (B, T, C)."""
        if self.kernel_size > 1:
            if mask is not None:
                y = zero_padded(y, mask.bool())
            y = windows(y, self.kernel_size)
        return squared_linear(y, weight.flatten(1), bias)

    def extra_repr(self) -> str:
        classes, channels = self.weight.shape[:2]
        return (
            f"{channels}, {classes}, channel_axis={self.channel_axis}, "
            f"kernel_size={self.kernel_size}"
        )


class AtEachPosition(nn.Module):
    """A head of flat values, (N, C) to (N, J), at each position of a block's output.

    Args:
        head: of flat values.
        channel_axis: axis of the channels in the batched output.
        classes_last: whether the scores are (B, T, J), and not (B, J, ...).
        hidden: units of the head's hidden layer. With such a layer, the positions go through the
            head part by part (`by_rows`); with 0 all at once.
    """

    def __init__(
        self, head: nn.Module, channel_axis: int, *, classes_last: bool, hidden: int = 0
    ) -> None:
        super().__init__()
        self.head = head
        self.channel_axis = channel_axis
        self.classes_last = classes_last
        self.hidden = hidden

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness at each position of a block's output.

        Args:
            y: the output of a block.
            mask: not used, since no position sees another.
        """
        positions = y.movedim(self.channel_axis, -1)
        rows = positions.reshape(-1, positions.shape[-1])
        goodness = by_rows(self.head, rows, self.hidden) if self.hidden else self.head(rows)
        scores = goodness.reshape(*positions.shape[:-1], goodness.shape[1])
        return scores if self.classes_last else scores.movedim(-1, 1)
