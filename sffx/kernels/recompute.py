"""A layer together with the norm and the activation before it, whose input is computed again in the backward pass instead of kept.

Of `x -> norm -> activation -> layer`, autograd keeps three tensors: x for the norm, the norm's output for the activation, and the
activation's output for the layer. `recomputed` keeps x. Norms and activations cost little next to a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sffx.kernels.activation import ACTIVATIONS, Activation, gradients_are_private

_aten = torch.ops.aten

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The modules whose formulas are known. Exact classes: someone may have put another in a module's place, or wrapped it.
_KNOWN = {*BATCH_NORMS, *CONVOLUTIONS, nn.LayerNorm, nn.Linear, nn.Dropout, nn.MultiheadAttention}

# Rows of a linear layer are taken in parts of about this many values of its input: they stay in a processor's cache.
_PART = 2**18


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
    """Return `layer(dropout(activation(norm(x))))`, keeping x, but not what lies between, for the backward pass.

    Hooks on the modules, a dropout that drops, a norm that uses its running statistics and autocast are left to torch, with what it keeps.

    Args:
        x: input of the norm, or of the activation where there is no norm.
        layer: a linear layer or a convolution.
        norm: a batch norm or a layer norm.
        activation: name of one of `ACTIVATIONS`.
        dropout: is left out while it drops nothing.
        overwrite: whether nobody else reads x, not even what made it, so that its gradient may be written over it.
        frees_gradient: whether the gradient of the output is nobody else's, so that it may be freed as soon as it was used.
    """
    modules = [module for module in (norm, dropout, layer) if module is not None]
    drops = dropout is not None and dropout.training and dropout.p > 0
    if drops or not can_recompute(x, modules):
        y = norm(x) if norm is not None else x
        y = ACTIVATIONS[activation].function(y) if activation else y
        return layer(dropout(y) if dropout is not None else y)
    private = gradients_are_private()
    chain = Chain(
        norm,
        ACTIVATIONS[activation] if activation else None,
        layer,
        overwrite=overwrite and private,
        frees_gradient=frees_gradient and private,
    )
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return Recomputed.apply(x, weight, bias, layer.weight, layer.bias, chain)


def can_recompute(x: Tensor, modules: list[Any]) -> bool:
    """Whether a backward pass follows, and the modules compute no more and no less than their formulas."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return False
    if not all(type(module) in _KNOWN and is_plain(module) for module in modules):
        return False
    norms = [module for module in modules if isinstance(module, BATCH_NORMS)]
    one_value = (
        x.numel() == x.shape[1]
    )  # for each channel, which torch refuses to take the variance of
    return not any(one_value or (not norm.training and norm.track_running_stats) for norm in norms)


def is_plain(module: Any) -> bool:
    """Whether a call of a module is its class's forward and nothing else: no hook, and no forward of its own."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return (
        not any(hooks)
        and "forward" not in module.__dict__
        and not torch.nn.modules.module._has_any_global_hook()
    )


@dataclass(frozen=True)
class Chain:
    """The computation of a layer's input, and of the layer; a linear layer where none is given. The rest is as in `recomputed`."""

    norm: Any = None
    activation: Activation | None = None
    layer: Any = None
    overwrite: bool = False
    frees_gradient: bool = False

    @property
    def is_linear(self) -> bool:
        return self.layer is None or isinstance(self.layer, nn.Linear)

    @property
    def by_rows(self) -> bool:
        """Whether it is an activation and a linear layer, where no row depends on another."""
        return self.is_linear and self.norm is None and self.activation is not None

    def track(self) -> list[Any]:
        """Return the running statistics that the norm updates and the weight of this batch in them, as `torch.nn` norms do it."""
        if (
            not isinstance(self.norm, BATCH_NORMS)
            or not self.norm.training
            or not self.norm.track_running_stats
        ):
            return [None, None, 0.0]
        if self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.add_(1)
        momentum = (
            self.norm.momentum
            if self.norm.momentum is not None
            else 1 / int(self.norm.num_batches_tracked or 1)
        )
        return [self.norm.running_mean, self.norm.running_var, momentum]

    def normalised(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: list[Any]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the norm's output and what its backward pass asks for."""
        if self.norm is None:
            return x, ()
        if isinstance(self.norm, nn.LayerNorm):
            z, *statistics = torch.native_layer_norm(
                x, self.norm.normalized_shape, weight, bias, self.norm.eps
            )
            return z, tuple(statistics)
        mean, variance, momentum = running
        z, *statistics = _aten._batch_norm_impl_index(
            x, weight, bias, mean, variance, True, momentum, self.norm.eps, True
        )
        return z, tuple(statistics)

    def activated(self, z: Tensor) -> Tensor:
        """Return the layer's input."""
        return self.activation.function(z) if self.activation is not None else z

    def before_norm(
        self,
        dz: Tensor,
        x: Tensor,
        weight: Any,
        bias: Any,
        statistics: tuple[Any, ...],
        wanted: list[bool],
    ) -> Any:
        """Return the gradients of x and of the norm's weight and bias, those that are wanted."""
        if self.norm is None:
            return dz, None, None
        if isinstance(self.norm, nn.LayerNorm):
            return _aten.native_layer_norm_backward(
                dz, x, self.norm.normalized_shape, *statistics, weight, bias, wanted
            )
        mean, inverse_deviation, reserve, index = statistics
        settings = (None, None, mean, inverse_deviation, True, self.norm.eps, wanted, reserve)
        return _aten._batch_norm_impl_index_backward(index, x, dz, weight, *settings)

    def apply_layer(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (
            F.linear(y, weight, bias)
            if self.is_linear
            else self.layer._conv_forward(y, weight, bias)
        )

    def input_gradient(self, dout: Tensor, like: Tensor, weight: Tensor) -> Any:
        """Return the gradient of the layer's input, which is as large as `like`."""
        return (
            dout @ weight
            if self.is_linear
            else self.convolution_gradients(dout, like, weight, [True, False, False])[0]
        )

    def parameter_gradients(
        self, dout: Tensor, y: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the layer's weight and bias, those that are wanted, from its input."""
        if not self.is_linear:
            return self.convolution_gradients(dout, y, weight, [False, *wanted])[1:]
        rows = dout.flatten(0, -2)
        return rows.t() @ y.flatten(0, -2) if wanted[0] else None, rows.sum(0) if wanted[
            1
        ] else None

    def convolution_gradients(
        self, dout: Tensor, y: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, the weight and the bias of a convolution, those that are wanted."""
        space, layer = y.ndim - 2, self.layer
        settings = (
            [weight.shape[0]],
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * space,
            layer.groups,
            wanted,
        )
        return _aten.convolution_backward(dout, y, weight, *settings)


class Recomputed(Function):
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
        if chain.by_rows:
            ctx.chain = chain
            ctx.save_for_backward(x, None, None, weight)
            return _linear_forward(x, weight, bias, chain)
        z, statistics = chain.normalised(x, norm_weight, norm_bias, chain.track())
        tensors = [value for value in statistics if isinstance(value, Tensor)]
        ctx.chain, ctx.numbers = chain, statistics[len(tensors) :]
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, *tensors)
        return chain.apply_layer(chain.activated(z), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.chain.by_rows:
            return _linear_backward(ctx, dout)
        x, norm_weight, norm_bias, weight, *tensors = ctx.saved_tensors
        chain, wanted = ctx.chain, list(ctx.needs_input_grad[:5])
        z, _ = chain.normalised(x, norm_weight, norm_bias, [None, None, 0.0])
        dw, db = (
            chain.parameter_gradients(dout, chain.activated(z), weight, wanted[3:])
            if any(wanted[3:])
            else (None, None)
        )
        if not any(wanted[:3]):
            return None, None, None, dw, db, None
        # x stands in for the layer's input, of whose gradient it has the size: z may go as soon as the activation has seen it.
        if chain.activation is None:
            del z
            dz = chain.input_gradient(dout, x, weight)
        else:
            dz = chain.activation.write_gradient(chain.input_gradient(dout, x, weight), z)
            del z
        if chain.frees_gradient:
            _free(dout)
        return (
            *chain.before_norm(dz, x, norm_weight, norm_bias, (*tensors, *ctx.numbers), wanted[:3]),
            dw,
            db,
            None,
        )


def _free(gradient: Tensor) -> None:
    """Let go of the memory of a gradient that autograd holds until the backward function returns."""
    gradient.set_()  # type: ignore[call-overload]


def _row_parts(rows: Tensor) -> list[slice]:
    size = max(1, _PART // rows.shape[1])
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight))
    for part in _row_parts(rows):
        y = chain.activated(rows[part])
        if bias is None:
            torch.mm(y, weight.t(), out=out[part])
        else:
            torch.addmm(bias, y, weight.t(), out=out[part])
    return out.view(*x.shape[:-1], len(weight))


def _linear_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass of activation and linear layer, by parts of the rows."""
    x, _, _, weight = ctx.saved_tensors
    wants_x, _, _, wants_weight, wants_bias = ctx.needs_input_grad[:5]
    rows, above = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    dx = (rows if ctx.chain.overwrite else torch.empty_like(rows)) if wants_x else None
    dw = torch.zeros_like(weight) if wants_weight else None
    for part in _row_parts(rows):
        if dw is not None:
            dw.addmm_(above[part].t(), ctx.chain.activated(rows[part]))
        if dx is not None:
            dx[part] = ctx.chain.activation.write_gradient(above[part] @ weight, rows[part])
    # `.data`, because a view would keep x, and with it the memory, for as long as autograd holds the gradient.
    return (
        dx.view_as(x).data if dx is not None else None,
        None,
        None,
        dw,
        above.sum(0) if wants_bias else None,
        None,
    )
