"""The paper's head: an auxiliary convolution, whose mean square is the goodness."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sffx.checks import positive_integer
from sffx.errors import InputError
from sffx.kernels.goodness import (
    as_positions,
    convolved_goodness,
    pointwise_goodness,
    token_goodness,
)
from sffx.kernels.padding import windows, zero_padded
from sffx.kernels.precision import full_precision, widened


class SFFGoodness(nn.Module):
    """`g[n, j] = mean over space of conv_k(Y)[n, j]^2` (section 4.3, step 2).

    Args:
        channels: C of the block's output.
        num_classes: J.
        channel_axis: axis of the channels in the batched output: 1 for (B, C, H, W) or (B, C), 2
            for (B, T, C), 3 for (B, H, W, C).
        spatial: number of axes besides batch and channels; 0 for flat values.
        kernel_size: k of the convolution, odd. The input is padded with zeros, so that the output
            has as many positions as the input. For flat values, which have no space, k is 1.

    Raises:
        InputError: there is no convolution with such kernels.

    Attributes:
        weight: (J, C, k, ...), initialised as that of a `torch.nn` convolution.
        bias: (J,).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        channel_axis: int = 1,
        spatial: int = 2,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        check_kernel_size(kernel_size, spatial)
        self.channel_axis = channel_axis
        self.spatial = spatial
        self.kernel_size = kernel_size if spatial else 1
        kernel_shape = [self.kernel_size] * max(spatial, 1)
        self.weight = nn.Parameter(torch.empty(num_classes, channels, *kernel_shape))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `torch.nn` convolutions do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        # The values that one output reads: C for each position of the kernel.
        fan_in = self.weight[0].numel()
        bound = 1 / math.sqrt(fan_in)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The mean then runs over
                these alone.
        """
        with full_precision(y):
            wide = widened(y)
            weight = self.weight.to(wide.dtype)
            bias = self.bias.to(wide.dtype)
            if mask is not None:
                return self._over_tokens(wide, weight, bias, mask.bool())
            if self.kernel_size > 1:
                return convolved_goodness(wide.movedim(self.channel_axis, 1), weight, bias)
            # A kernel of one position does not see space, so all axes of space become one.
            positions = as_positions(wide, self.channel_axis)
            return pointwise_goodness(positions, weight.flatten(1), bias)

    def _over_tokens(self, y: Tensor, weight: Tensor, bias: Tensor, real: Tensor) -> Tensor:
        if self.kernel_size > 1:
            # A kernel reads zeros at padding tokens, as it does beyond the ends of the sequence.
            y = windows(zero_padded(y, real), self.kernel_size)
        return token_goodness(y, weight.flatten(1), bias, real)

    def extra_repr(self) -> str:
        classes, channels = self.weight.shape[:2]
        return (
            f"{channels}, {classes}, channel_axis={self.channel_axis}, "
            f"kernel_size={self.kernel_size}"
        )


def check_kernel_size(kernel_size: object, spatial: int) -> None:
    """Raise an InputError if there is no convolution of a kernel size over some axes of space."""
    hint = "pass an odd positive integer; 1 is the default"
    size = positive_integer("kernel_size", kernel_size, hint)
    if size % 2 == 0:
        raise InputError(f"kernel_size is {size}. Hint: {hint}")
    if size > 1 and spatial > 3:
        raise InputError(
            f"kernel_size is {size}, but a value with {spatial} axes of space has no such "
            "convolution. Hint: kernel_size=1"
        )
