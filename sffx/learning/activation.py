"""Activations whose backward pass writes its result over the gradient that it is given, instead of beside it.

They may only stand where that gradient is nobody else's: where one layer reads the activation, which makes a gradient of its own for it.
And they only do so inside `private_gradients()`, where whoever computes the gradients keeps none but those of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
_PRIVATE: ContextVar[bool] = ContextVar("gradients are private", default=False)


@contextmanager
def private_gradients() -> Iterator[None]:
    """Promise that nobody sees the gradients of what is computed inside but those of the parameters."""
    token = _PRIVATE.set(True)
    try:
        yield
    finally:
        _PRIVATE.reset(token)


def gradients_are_private() -> bool:
    """Whether the code runs inside `private_gradients()`."""
    return _PRIVATE.get()


class LeanReLU(nn.ReLU):
    """`torch.nn.ReLU`, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return _ReLU.apply(x, self.inplace) if _may_write_over(x) else super().forward(x)


class LeanHardswish(nn.Hardswish):
    """`torch.nn.Hardswish`, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pointwise.apply(x, F.hardswish, _aten.hardswish_backward, "out") if _may_write_over(x) else super().forward(x)


class LeanSiLU(nn.SiLU):
    """`torch.nn.SiLU`, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pointwise.apply(x, F.silu, _aten.silu_backward, "grad_input") if _may_write_over(x) else super().forward(x)


class LeanGELU(nn.GELU):
    """`torch.nn.GELU` in its exact form, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pointwise.apply(x, F.gelu, _aten.gelu_backward, "grad_input") if _may_write_over(x) else super().forward(x)


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


def _may_write_over(x: Tensor) -> bool:
    return _PRIVATE.get() and is_training_step(x)


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
        if gradient.stride() != y.stride():  # a view, or laid out otherwise: the plain result is laid out as torch would
            return _aten.threshold_backward(gradient, y, 0), None
        return _aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient), None


class _Pointwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], backward: Any, out: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backward_of, ctx.out = backward, out
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if gradient.stride() != x.stride():
            return ctx.backward_of(gradient, x), None, None, None
        return ctx.backward_of(gradient, x, **{ctx.out: gradient}), None, None, None
