"""Activations whose backward pass writes its result over the gradient that it is given.

Use them only where no other code holds that gradient: where one layer reads the activation, and
makes a new gradient for it. They write over it only inside `private_gradients()`, where the caller
keeps no gradients but those of the parameters. Values and gradients are those of `torch.nn`.
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

from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.scoped import scoped

_aten = torch.ops.aten
_PRIVATE: ContextVar[bool] = ContextVar("gradients are private", default=False)


@dataclass(frozen=True)
class Activation:
    """A pointwise function and its gradient.

    Attributes:
        function: of its input.
        backward: the operator that returns the gradient of the input, given that of the output and
            the input. For a ReLU, the output may stand in for the input.
        out: the operator's keyword for a tensor to write the result to.
        settings: further arguments of the operator.
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

# The name in `ACTIVATIONS` of each class and function that computes an activation.
NAMES: dict[Any, str] = {
    nn.ReLU: "relu",
    F.relu: "relu",
    torch.relu: "relu",
    nn.Hardswish: "hardswish",
    F.hardswish: "hardswish",
    nn.SiLU: "silu",
    F.silu: "silu",
    nn.GELU: "gelu",
}


@contextmanager
def private_gradients(private: bool = True) -> Iterator[None]:
    """Promise that nobody sees the gradients of values computed inside, but of parameters only.

    Args:
        private: False takes back an outer promise.
    """
    with scoped(_PRIVATE, private):
        yield


def gradients_are_private() -> bool:
    """Return whether the code runs inside `private_gradients()`."""
    return _PRIVATE.get()


def is_training_step(x: Tensor) -> bool:
    """Return whether a backward pass will follow, and no compiler writes it."""
    return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()


class MemorySavingReLU(nn.ReLU):
    """`torch.nn.ReLU` that writes over its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_write_over_gradient(x):
            return super().forward(x)
        return _ReLU.apply(x, self.inplace)


class MemorySavingHardswish(nn.Hardswish):
    """`torch.nn.Hardswish` that writes over its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_write_over_gradient(x):
            return super().forward(x)
        return _Pointwise.apply(x, ACTIVATIONS["hardswish"])


class MemorySavingSiLU(nn.SiLU):
    """`torch.nn.SiLU` that writes over its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_write_over_gradient(x):
            return super().forward(x)
        return _Pointwise.apply(x, ACTIVATIONS["silu"])


class MemorySavingGELU(nn.GELU):
    """`torch.nn.GELU` in its exact form that writes over its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not _may_write_over_gradient(x):
            return super().forward(x)
        return _Pointwise.apply(x, ACTIVATIONS["gelu"])


_CLASSES: dict[str, type[nn.Module]] = {
    "relu": MemorySavingReLU,
    "hardswish": MemorySavingHardswish,
    "silu": MemorySavingSiLU,
    "gelu": MemorySavingGELU,
}

# The memory-saving class for each class and function that computes an activation.
MEMORY_SAVING = {kind: _CLASSES[name] for kind, name in NAMES.items()}


def _may_write_over_gradient(x: Tensor) -> bool:
    return _PRIVATE.get() and is_training_step(x)


class _ReLU(HandWritten):
    """A ReLU that keeps its output, so that it may write over its input as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x.relu_() if inplace else x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _gradient_written_over(dy, y, ACTIVATIONS["relu"]), None


class _Pointwise(HandWritten):
    """Any other activation, which keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activation.function(x)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _gradient_written_over(dy, x, ctx.activation), None


def _gradient_written_over(dy: Tensor, kept: Tensor, activation: Activation) -> Tensor:
    # Other strides: dy is a view, or the result must be laid out as torch would lay it out.
    if dy.stride() != kept.stride():
        return activation.gradient(dy, kept)
    return activation.write_gradient(dy, kept)
