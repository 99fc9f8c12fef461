"""The square of a linear layer at each position, with little memory where there are many classes.

`g[n, j] = (w_j . y_n + b_j)^2`. Autograd would keep the product, as large as the goodness, beside
the goodness itself. With many classes the product is computed again in the backward pass, part by
part of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.batch_slices import small_slices
from sffx.kernels.entropy import MANY_CLASSES
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.products import add_product, product, product_added


def squared_linear(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the squares (..., J) of y (..., C), for a weight (J, C) and a bias (J,)."""
    # A graph that is made, by torch.compile or an exporter, cannot hold the function.
    if len(weight) < MANY_CLASSES or torch.compiler.is_compiling():
        return F.linear(y, weight, bias).square()
    rows = y.reshape(-1, y.shape[-1])
    return _SquaredLinear.apply(rows, weight, bias).view(*y.shape[:-1], len(weight))


class _SquaredLinear(HandWritten):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, bias)
        return add_product(bias, rows, weight.t()).square_()

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        d_rows = torch.empty_like(rows) if wants_rows else None
        d_weight = None
        d_bias = torch.zeros_like(bias) if wants_bias else None
        for part in small_slices(rows, len(weight)):
            # dg/dz = 2 z
            dz = add_product(bias, rows[part], weight.t()).mul_(dg[part]).mul_(2)
            if d_rows is not None:
                d_rows[part] = product(dz, weight)
            if wants_weight:
                d_weight = product_added(d_weight, dz.t(), rows[part])
            if d_bias is not None:
                d_bias += dz.sum(0)
        return d_rows, d_weight, d_bias
