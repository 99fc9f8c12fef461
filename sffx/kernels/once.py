"""Backward passes that are not differentiated themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sffx.errors import InputError


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
