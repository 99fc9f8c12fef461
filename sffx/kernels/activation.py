"""Activations whose backward pass writes its result over the gradient that it is given, instead of beside it.

They may only stand where that gradient is nobody else's: where one layer reads the activation, which makes a gradient of its own for it.
And they only do so inside `private_gradients()`, where whoever computes the gradients keeps none but those of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
_PRIVATE: ContextVar[bool] = ContextVar("gradients are private", default=False)


@dataclass(frozen=True)
class Activation:
    """A pointwise function and its gradient.

    Attributes:
        function: of its input.
        backward: the operator that computes the gradient from that of the output and from the input (of a ReLU, the output will do).
        out: the operator's name for a tensor to write the result to.
        settings: its arguments besides.
    """

    function: Callable[[Tensor], Tensor]
    backward: Any
    out: str = "grad_input"
    settings: tuple[float, ...] = ()

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of x, given that of the output."""
        return self.backward(dy, x, *self.settings)

    def write_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """Write the gradient of x over that of the output, and return it."""
        return self.backward(dy, x, *self.settings, **{self.out: dy})


ACTIVATIONS = {
    "relu": Activation(torch.relu, _aten.threshold_backward, settings=(0,)),
    "hardswish": Activation(F.hardswish, _aten.hardswish_backward, out="out"),
    "silu": Activation(F.silu, _aten.silu_backward),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
}

# The class and the functions that compute each activation.
NAMES: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu), "relu"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    nn.GELU: "gelu",
}


@contextmanager
def private_gradients(private: bool = True) -> Iterator[None]:
    """Promise that nobody sees the gradients of what is computed inside but those of the parameters; or, with False, do not."""
    token = _PRIVATE.set(private)
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
        return (
            _Pointwise.apply(x, ACTIVATIONS["hardswish"])
            if _may_write_over(x)
            else super().forward(x)
        )


class LeanSiLU(nn.SiLU):
    """`torch.nn.SiLU`, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            _Pointwise.apply(x, ACTIVATIONS["silu"]) if _may_write_over(x) else super().forward(x)
        )


class LeanGELU(nn.GELU):
    """`torch.nn.GELU` in its exact form, same values and gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            _Pointwise.apply(x, ACTIVATIONS["gelu"]) if _may_write_over(x) else super().forward(x)
        )


_TWINS: dict[str, type[nn.Module]] = {
    "relu": LeanReLU,
    "hardswish": LeanHardswish,
    "silu": LeanSiLU,
    "gelu": LeanGELU,
}

# The class and the functions of each activation, and its lean twin.
LEAN = {kind: _TWINS[name] for kind, name in NAMES.items()}


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
        return _written_over(gradient, y, ACTIVATIONS["relu"]), None


class _Pointwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation.function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _written_over(gradient, x, ctx.activation), None


def _written_over(gradient: Tensor, kept: Tensor, activation: Activation) -> Tensor:
    if (
        gradient.stride() != kept.stride()
    ):  # a view, or laid out otherwise: the plain result is laid out as torch would
        return activation.gradient(gradient, kept)
    return activation.write_gradient(gradient, kept)
