"""A max pool that keeps its indices for the backward pass, but not its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sffx.kernels.activation import is_training_step
from sffx.kernels.once import HandWritten, first_derivatives_only

_Pair = list[int]


class MemorySavingMaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`, same values and gradients, that does not keep its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled input, (B, C, H, W)."""
        x = input  # its name is that of torch's own, for a forward that passes it by name
        # torch's own pool does as well where nothing is kept. It is needed for other layouts too,
        # where the gradient's layout is read off the input.
        if not (is_training_step(x) and x.ndim == 4 and x.is_contiguous()):
            return super().forward(x)
        kernel = _pair(self.kernel_size)
        stride = _pair(self.stride)
        padding = _pair(self.padding)
        dilation = _pair(self.dilation)
        return _MaxPool.apply(x, kernel, stride, padding, dilation, self.ceil_mode)


class _MaxPool(HandWritten):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: _Pair,
        stride: _Pair,
        padding: _Pair,
        dilation: _Pair,
        ceil_mode: bool,
    ) -> Tensor:
        geometry = (kernel, stride, padding, dilation, ceil_mode)
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
        ctx.save_for_backward(indices)
        ctx.geometry = geometry
        ctx.shape = x.shape
        return pooled

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        dy = dy.contiguous()
        # torch asks the input for its shape only, so one value stands for all.
        like = dy.as_strided(ctx.shape, [0] * len(ctx.shape))
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, like, *ctx.geometry, indices)
        return dx, None, None, None, None, None


def _pair(size: int | tuple[int, ...]) -> _Pair:
    return [size, size] if isinstance(size, int) else list(size)
