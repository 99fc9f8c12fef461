"""A layer together with the norm and the activation before it, with less kept.

For `x -> norm -> activation -> layer`, autograd keeps three tensors: x for the norm, the norm's
output for the activation, and the activation's output for the layer. `recomputed` keeps x alone,
and computes the others again in the backward pass. Norms and activations cost little beside a
layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sffx.kernels.activation import ACTIVATIONS, gradients_are_private
from sffx.kernels.chain import BATCH_NORMS, CONVOLUTIONS, Chain, Running
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.rows import gradients_by_rows, output_by_rows

# The modules whose formulas are known. Exact classes: a subclass may compute something else.
_KNOWN = {*BATCH_NORMS, *CONVOLUTIONS, nn.LayerNorm, nn.Linear, nn.Dropout, nn.MultiheadAttention}


def recomputed(
    x: Tensor,
    layer: Any,
    *,
    norm: Any = None,
    activation: str | None = None,
    dropout: Any = None,
    overwrite: bool = False,
    frees_gradient: bool = False,
) -> Tensor:
    """Return `layer(dropout(activation(norm(x))))`, keeping only x for the backward pass.

    torch computes and keeps what it always does where modules have hooks, where a dropout drops,
    where a norm uses its running statistics, and under autocast.

    Args:
        x: input of the norm, or of the activation where there is no norm.
        layer: a linear layer or a convolution.
        norm: a batch norm or a layer norm.
        activation: a name in `ACTIVATIONS`.
        dropout: is left out while it drops nothing.
        overwrite: whether nobody else reads x, not even the layer that made it in its backward
            pass. The gradient of x may then be written over x.
        frees_gradient: whether nobody else holds the gradient of the output. It may then be freed
            as soon as it was used.
    """
    modules = [module for module in (norm, dropout, layer) if module is not None]
    drops = dropout is not None and dropout.training and dropout.p > 0
    if drops or not can_recompute(x, modules):
        return _as_torch_does(x, layer, norm, activation, dropout)
    is_private = gradients_are_private()
    chain = Chain(
        norm,
        ACTIVATIONS[activation] if activation else None,
        layer,
        overwrite=overwrite and is_private,
        frees_gradient=frees_gradient and is_private,
    )
    norm_weight = None if norm is None else norm.weight
    norm_bias = None if norm is None else norm.bias
    return Recomputed.apply(x, norm_weight, norm_bias, layer.weight, layer.bias, chain)


def _as_torch_does(x: Tensor, layer: Any, norm: Any, activation: str | None, dropout: Any) -> Any:
    y = norm(x) if norm is not None else x
    if activation:
        y = ACTIVATIONS[activation].function(y)
    if dropout is not None:
        y = dropout(y)
    return layer(y)


def can_recompute(x: Tensor, modules: list[Any]) -> bool:
    """Return whether a backward pass follows, and the modules compute exactly their formulas."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # A tensor on "meta" has no autocast.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return False
    for module in modules:
        if type(module) not in _KNOWN or not is_plain(module):
            return False
        if isinstance(module, BATCH_NORMS) and not _takes_variance_of(module, x):
            return False
    return True


def _takes_variance_of(norm: Any, x: Tensor) -> bool:
    """Return whether a batch norm normalises x by the statistics of x itself."""
    has_one_value_a_channel = x.numel() == x.shape[1]  # which torch refuses, with its own error
    uses_running_statistics = not norm.training and norm.track_running_stats
    return not has_one_value_a_channel and not uses_running_statistics


def is_plain(module: Any) -> bool:
    """Return whether a call of a module is its class's forward and nothing else.

    A hook, or a forward of its own, makes it more.
    """
    return all_plain((module,))


def all_plain(modules: Iterable[Any]) -> bool:
    """Return whether a call of each module is its class's forward and nothing else."""
    if torch.nn.modules.module._has_any_global_hook():
        return not list(modules)
    for module in modules:
        has_hooks = (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        if has_hooks or "forward" in module.__dict__:
            return False
    return True


class Recomputed(HandWritten):
    """The output of a `Chain`, which keeps x and the norm's statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        chain: Chain,
    ) -> Tensor:
        ctx.chain = chain
        if chain.by_rows:
            ctx.save_for_backward(x, None, None, weight)
            return _not_a_view(output_by_rows(x, weight, bias, chain))
        z, statistics = chain.normalised(x, norm_weight, norm_bias, chain.tracked())
        # The statistics are tensors, then numbers, which autograd does not save.
        tensors = [value for value in statistics if isinstance(value, Tensor)]
        ctx.numbers = statistics[len(tensors) :]
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, *tensors)
        return _not_a_view(chain.layer_output(chain.activated(z), weight, bias))

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, *tensors = ctx.saved_tensors
        chain: Chain = ctx.chain
        wants_x, wants_norm_weight, wants_norm_bias, *wants_layer = ctx.needs_input_grad[:5]
        if chain.by_rows:
            dx, dw, db = gradients_by_rows(dout, x, weight, chain, (wants_x, *wants_layer))
            return dx, None, None, dw, db, None
        z, _ = chain.normalised(x, norm_weight, norm_bias, Running())
        dw, db = None, None
        if any(wants_layer):
            dw, db = chain.parameter_gradients(dout, chain.activated(z), weight, wants_layer)
        wants_before = [wants_x, wants_norm_weight, wants_norm_bias]
        if not any(wants_before):
            return None, None, None, dw, db, None
        # x stands in for the layer's input, since only its size matters here. So z is freed as
        # early as possible.
        if chain.activation is None:
            del z
            dz = chain.input_gradient(dout, x, weight)
        else:
            dy = chain.input_gradient(dout, x, weight)
            dz = chain.activation.write_gradient(dy, z)
            del z
        if chain.frees_gradient:
            _free(dout)
        statistics = (*tensors, *ctx.numbers)
        gradients = chain.norm_gradients(dz, x, norm_weight, norm_bias, statistics, wants_before)
        return (*gradients, dw, db, None)


def _not_a_view(output: Tensor) -> Tensor:
    """Return an output that later operations may write on, as on that of a layer of torch.

    A linear layer computes a matrix and returns a view of it, on which autograd forbids writes
    where the view was made inside a Function. No other name sees the matrix.
    """
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _free(gradient: Tensor) -> None:
    """Free the memory of a gradient that autograd holds until the backward function returns."""
    gradient.set_()  # type: ignore[call-overload]
