"""Activations whose backward pass writes its result over the gradient that it is given, instead of beside it.

They may only stand where that gradient is nobody else's: where one layer reads the activation, which makes a gradient of its own for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten


class LeanReLU(nn.ReLU):
    """`torch.nn.ReLU`, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return _ReLU.apply(x, self.inplace) if is_training_step(x) else super().forward(x)


class LeanHardswish(nn.Hardswish):
    """`torch.nn.Hardswish`, same values and gradients; never in place in training, since its backward pass asks for its input."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pointwise.apply(x, F.hardswish, _hardswish_backward) if is_training_step(x) else super().forward(x)


class LeanSiLU(nn.SiLU):
    """`torch.nn.SiLU`, same values and gradients; never in place in training, since its backward pass asks for its input."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pointwise.apply(x, F.silu, _silu_backward) if is_training_step(x) else super().forward(x)


class LeanGELU(nn.GELU):
    """`torch.nn.GELU` in its exact form, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pointwise.apply(x, F.gelu, _gelu_backward) if is_training_step(x) else super().forward(x)


# The class and the function of each activation, and its lean twin.
LEAN: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu), LeanReLU),
    **dict.fromkeys((nn.Hardswish, F.hardswish), LeanHardswish),
    **dict.fromkeys((nn.SiLU, F.silu), LeanSiLU),
    nn.GELU: LeanGELU,
}


def is_training_step(x: Tensor) -> bool:
    """Whether a backward pass will follow that nobody else takes care of, as a compiler does."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _aten.threshold_backward.grad_input(gradient, y, 0, grad_input=_own(gradient)), None


class _Pointwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.into = backward
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.into(gradient, x, _own(gradient)), None, None


def _hardswish_backward(gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return _aten.hardswish_backward.out(gradient, x, out=out)


def _silu_backward(gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(gradient, x, grad_input=out)


def _gelu_backward(gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return _aten.gelu_backward.grad_input(gradient, x, grad_input=out)


def _own(gradient: Tensor) -> Tensor:
    """Return where the result may go: over the gradient, unless that is a broadcast view, whose elements share memory."""
    return torch.empty_like(gradient, memory_format=torch.contiguous_format) if 0 in gradient.stride() else gradient
