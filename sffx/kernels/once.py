"""Functions of autograd whose backward pass is written by hand, and has no derivative itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from sffx.errors import InputError


class HandWritten(Function):
    """A `Function` that no transform of `torch.func` can pass, and no derivative forwards.

    It says so itself. A `jvp` that raises an error would say it as well, but `torch.compile` takes
    no function that has one.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Compute the value.

        Raises:
            InputError: a transform of `torch.func` is at work, or a derivative forwards is asked
                for.
        """
        if torch._C._are_functorch_transforms_active():
            raise InputError(
                "torch.func.grad, vmap and other transforms do not pass what a cut model computes. "
                "Hint: loss.backward() or torch.autograd.grad; or transform the model that "
                "sffx.extract(net) returns"
            )
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise InputError(
                "derivatives forwards do not pass what a cut model computes. Hint: loss.backward() "
                "or torch.autograd.grad; or the model that sffx.extract(net) returns"
            )
        return super().apply(*args, **kwargs)


def _has_tangent(value: Any) -> bool:
    """Return whether a value is a tensor whose derivative is computed forwards."""
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def first_derivatives_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward pass of a `Function`, which refuses `create_graph=True`.

    Torch's `once_differentiable` lets such a call pass. Its gradients then are constants, or lead
    to an error that `torch.autograd.grad` goes around. So a penalty on gradients would be computed,
    and would teach nothing.

    Raises:
        InputError: second derivatives are asked for.
    """
    differentiable_once = once_differentiable(backward)

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise InputError(
                "create_graph=True asks for second derivatives, but what a cut model computes has "
                "first ones only. Hint: leave it out; the model that sffx.extract(net) returns has "
                "second derivatives"
            )
        return differentiable_once(ctx, *gradients)

    return refusing
