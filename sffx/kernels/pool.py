"""A max pool that keeps its indices for the backward pass but not its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sffx.kernels.activation import is_training_step

Pair = list[int]


class LeanMaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`, same values and gradients, without the input among what is saved."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W)."""
        # Where nothing is saved, or the gradient's memory format would have to be read off the input, torch's own does as well.
        if not (is_training_step(x) and x.ndim == 4 and x.is_contiguous()):
            return super().forward(x)
        geometry = [
            _pair(size) for size in (self.kernel_size, self.stride, self.padding, self.dilation)
        ]
        return _MaxPool.apply(x, *geometry, self.ceil_mode)


class _MaxPool(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    ) -> Tensor:
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(
            x, kernel, stride, padding, dilation, ceil_mode
        )
        ctx.save_for_backward(indices)
        ctx.geometry, ctx.shape = (kernel, stride, padding, dilation, ceil_mode), x.shape
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        like = gradient.new_empty(1).expand(ctx.shape)  # torch asks the input for its shape only
        result = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient.contiguous(), like, *ctx.geometry, indices
        )
        return result, None, None, None, None, None


def _pair(size: int | tuple[int, ...]) -> Pair:
    return [size, size] if isinstance(size, int) else list(size)
