"""The SFF goodness by way of each sample's second moment, its form for many classes.

With `y~ = [y; 1]`, `w~_j = [w_j; b_j]` and `M = mean_p y~ y~^T`, the goodness is
`g_j = w~_j^T M w~_j`. No product here has J times P values: the cost over the positions does not
depend on J. The gradient of y is one product as well:
`dL/dy = 2/P (sum_j dL/dg_j w~_j w~_j^T) y~`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sffx.kernels.batch_slices import slices_within
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.products import add_products, product, product_added


class SecondMomentGoodness(HandWritten):
    """The goodness, (B, J), of y (B, C, P), weight (J, C) and bias (J,).

    M is split into the covariance around the mean, (B, C, C), and the mean, (B, C):
    `g_j = w_j^T Cov w_j + (w_j . mean + b_j)^2`. For the backward pass it keeps the product W Cov,
    (J, B, C), or the covariance where there are more classes than channels.

    Values of classes, samples and channels lie in memory as (J, B, C). So each product with the
    weight is one product of matrices over all samples.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = y.mean(2)
        covariance = _covariances(y, mean)
        # Twice the mean of z: the backward pass needs it, and a factor of 2 loses no digit.
        twice = torch.addmm(bias, mean, weight.t(), beta=2, alpha=2)
        if weight.shape[0] <= weight.shape[1]:
            w_cov = _with_each(weight, covariance)
            ctx.save_for_backward(y, weight, bias, mean, twice, None, w_cov)
            spread = (w_cov * weight[:, None]).sum(2).t()
        else:
            ctx.save_for_backward(y, weight, bias, mean, twice, covariance, None)
            spread = _spread(weight, covariance, _slices(y, weight))
        # A quarter, since both factors are twice the mean of z.
        return torch.addcmul(spread, twice, twice, value=0.25)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, twice, covariance, w_cov = ctx.saved_tensors
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        # The gradient of the mean of z, whose square is a part of g.
        d_mean_z = dg * twice
        dw = d_mean_z.t() @ mean if wants_weight else None
        if dw is not None and w_cov is not None:
            dw = dw.add_((w_cov * _of_classes(dg)).sum(1), alpha=2)
        db = d_mean_z.sum(0) if wants_bias else None
        needs_products = wants_y or (wants_weight and w_cov is None)
        if not needs_products:
            return None, dw, db
        slices = _slices(y, weight)
        # With one slice alone, its gradient is that of y, without a copy.
        dy = torch.empty_like(y) if wants_y and len(slices) > 1 else None
        # Copied, so that its products with the weight lie in memory as (J, B, C).
        by_class = _of_classes(dg).contiguous()
        for part in slices:
            scaled = weight[:, None] * by_class[:, part]  # (J, B, C)
            if dw is not None and w_cov is None:
                by_row = covariance[part].flatten(0, 1)  # (B C, C)
                dw = product_added(dw, scaled.flatten(1), by_row, alpha=2)
            if dy is not None:
                dy[part] = _input_gradient(y[part], scaled, weight, bias)
            elif wants_y:
                dy = _input_gradient(y, scaled, weight, bias)
        return dy, dw, db


def _spread(weight: Tensor, covariance: Tensor, slices: list[slice]) -> Tensor:
    """Return `w_j^T Cov w_j` of each sample, (B, J), slice by slice."""
    spreads = []
    for part in slices:
        # No product has a name here: it would live on while the next one is computed.
        found = _with_each(weight, covariance[part]).mul_(weight[:, None]).sum(2)
        spreads.append(found.t())
    return spreads[0] if len(spreads) == 1 else torch.cat(spreads)


def _of_classes(values: Tensor) -> Tensor:
    """View (B, J) so that it broadcasts against (J, B, C)."""
    return values.t()[:, :, None]


def _input_gradient(y: Tensor, scaled: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the gradient of y, given `dL/dg_j w_j`, (J, B, C)."""
    samples, channels = y.shape[:2]
    scaled = scaled.flatten(1)  # (J, B C)
    # `sum_j dL/dg_j w_j w_j^T` and `sum_j dL/dg_j b_j w_j` of each sample.
    quadratic = product(scaled.t(), weight).view(samples, channels, channels)
    linear = (bias[None] @ scaled).view(samples, channels, 1)
    factor = 2 / y.shape[2]
    return add_products(linear, quadratic, y, beta=factor, alpha=factor)


def _slices(y: Tensor, weight: Tensor) -> list[slice]:
    """Split a batch so that (J, B, C) is, slice by slice, at most about twice as large as y."""
    return slices_within(y, (weight.numel() + 1) // 2, beside=weight)


def _covariances(y: Tensor, mean: Tensor) -> Tensor:
    """Return each sample's covariance over its positions, (B, C, C).

    The centred copy of y is freed before the backward pass makes its gradient, which is as large.
    """
    # Centred first: where the mean is large, its square would swallow the variance.
    centred = y - mean[:, :, None]
    # With a beta of 0, values of the first argument do not count.
    return add_products(mean[:, :, None], centred, centred.mT, beta=0, alpha=1 / y.shape[2])


def _with_each(weight: Tensor, covariances: Tensor) -> Tensor:
    """Return the products of the weight, (J, C), with each of (B, C, C), as (J, B, C)."""
    # A covariance is its own transpose.
    rows = covariances.flatten(0, 1)
    return product(weight, rows.t()).view(len(weight), *covariances.shape[:2])
