"""The SFF goodness by way of each sample's second moment, its form for many classes.

With `y~ = [y; 1]`, `w~_j = [w_j; b_j]` and `M = mean_p y~ y~^T`, the goodness is
`g_j = w~_j^T M w~_j`. No product here has J times P values: the cost over the positions does not
depend on J. The gradient of y is one product as well:
`dL/dy = 2/P (sum_j dL/dg_j w~_j w~_j^T) y~`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sffx.kernels.batch_slices import slices_within

# A centred copy of y, which the covariance needs, is made for about this part of y at a time.
_CENTRED_PARTS = 8


class SecondMomentGoodness(Function):
    """The goodness, (B, J), of y (B, C, P), weight (J, C) and bias (J,).

    M is split into the covariance around the mean, (B, C, C), and the mean, (B, C):
    `g_j = w_j^T Cov w_j + (w_j . mean + b_j)^2`. For the backward pass it keeps the product W Cov,
    (B, J, C), or the covariance where there are more classes than channels.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = y.mean(2)
        covariance = _covariances(y, mean)
        if weight.shape[0] <= weight.shape[1]:
            product = _with_each(weight, covariance)
            ctx.save_for_backward(y, weight, bias, mean, None, product)
            spread = (product * weight).sum(2)
        else:
            ctx.save_for_backward(y, weight, bias, mean, covariance, None)
            spreads = []
            for part in slices_within(y, weight.numel()):
                # No product has a name here: it would live on while the next one is computed.
                spreads.append(_with_each(weight, covariance[part]).mul_(weight).sum(2))
            spread = torch.cat(spreads)
        return spread.add_(torch.addmm(bias, mean, weight.t()).square_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, covariance, product = ctx.saved_tensors
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        mean_z = torch.addmm(bias, mean, weight.t())
        for part in slices_within(y, weight.numel()):
            scaled = weight * (2 * dg[part, :, None])  # (B, J, C)
            if dy is not None:
                _write_input_gradient(dy[part], y[part], scaled, weight, bias)
            if dw is not None and product is None:
                dw.addbmm_(scaled, covariance[part])
        if dw is not None:
            if product is not None:
                dw += (product * (2 * dg[:, :, None])).sum(0)
            dw.addmm_((2 * dg * mean_z).t(), mean)
        db = (2 * dg * mean_z).sum(0) if wants_bias else None
        return dy, dw, db


def _write_input_gradient(
    dy: Tensor, y: Tensor, scaled: Tensor, weight: Tensor, bias: Tensor
) -> None:
    """Write the gradient of y into dy, given `2 dL/dg_j w_j`, (B, J, C)."""
    positions = y.shape[2]
    quadratic = torch.bmm(scaled.mT, weight.expand(len(scaled), -1, -1)).div_(positions)
    linear = torch.matmul(bias, scaled).div_(positions)
    torch.baddbmm(linear[:, :, None], quadratic, y, out=dy)


def _covariances(y: Tensor, mean: Tensor) -> Tensor:
    """Return each sample's covariance over its positions, (B, C, C)."""
    # Centred first: where the mean is large, its square would swallow the variance.
    parts = slices_within(y, _CENTRED_PARTS * math.prod(y.shape[1:]))
    return torch.cat([_covariance(y[part], mean[part]) for part in parts])


def _covariance(y: Tensor, mean: Tensor) -> Tensor:
    centred = y - mean[:, :, None]
    return (centred @ centred.mT).div_(y.shape[2])


def _with_each(weight: Tensor, matrices: Tensor) -> Tensor:
    """Return the products of the weight, (J, C), with each of (B, C, C): (B, J, C)."""
    # `matmul` would fold the batch into an axis, and copy its result.
    return torch.bmm(weight.expand(len(matrices), -1, -1), matrices)
