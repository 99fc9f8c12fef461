"""The cosine between features and learned directions, and a hidden layer, with few operations.

Autograd would make a chain of small operations of each, forward and backward. On a GPU every one of
them is a launch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.products import product

_aten = torch.ops.aten

# Is added to the mean square of a row before it is divided by its length. A row that is nearly zero
# stays shorter: its direction would be noise, with a vast gradient.
EPS = 1e-5


def normed(features: Tensor) -> Tensor:
    """Return rows (N, features) with a mean of 0 and a variance of 1."""
    return F.layer_norm(features, features.shape[1:], eps=EPS)


def cosines(rows: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return a scale times the cosine between normed rows and directions, (N, J).

    Args:
        rows: (N, features), as `normed` returns them.
        weight: (J, features); only the direction of its rows counts.
        scale: of the cosine.
    """
    # The length of a normed row.
    factor = scale / math.sqrt(rows.shape[1])
    if torch.compiler.is_compiling():
        mean_square = weight.square().mean(1, keepdim=True)
        directions = weight * torch.rsqrt(mean_square + EPS) / math.sqrt(weight.shape[1])
        return F.linear(rows, factor * directions)
    return _Cosines.apply(rows, weight, factor)


def hidden_units(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `relu(x W^T + b)`, (N, hidden), for x (N, features)."""
    # Without a backward pass, two operations that every counter and exporter knows do as well.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.linear(x, weight, bias).relu()
    return _Hidden.apply(x, weight, bias)


class _Cosines(HandWritten):
    """Products of rows with those of a weight, each divided by the length of the weight's row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, factor: float) -> Tensor:
        # A column more makes the length that of the row with EPS added to its mean square. Its
        # value is also the length that torch's kernel then gives the rows.
        length = math.sqrt(weight.shape[1] * EPS)
        longer, lengths = _lengthened(weight, length)
        directions, norms = _aten._weight_norm_interface(longer, lengths, 0)
        directions = directions[:, :-1]
        ctx.save_for_backward(rows, weight, directions, lengths, norms)
        ctx.factor = factor / length
        # With a beta of 0, the values of the first argument do not count.
        return torch.addmm(norms.t(), rows, directions.t(), beta=0, alpha=ctx.factor)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, directions, lengths, norms = ctx.saved_tensors
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        d_rows = None
        if wants_rows:
            d_rows = torch.addmm(rows, dg, directions, beta=0, alpha=ctx.factor)
        d_weight = None
        if wants_weight:
            d_directions = torch.addmm(weight, dg.t(), rows, beta=0, alpha=ctx.factor)
            d_weight, _ = _aten._weight_norm_interface_backward(
                d_directions, weight, lengths, norms, 0
            )
        return d_rows, d_weight, None


def _lengthened(weight: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Return a weight with a column of a value added, and that value for each row, (J, 1)."""
    classes = len(weight)
    width = weight.shape[1] + 1
    # Rows are added as well, which are the second result. So both take one operation.
    longer = F.pad(weight, (0, 1, 0, math.ceil(classes / width)), value=value)
    return longer[:classes], longer[classes:].view(-1)[:classes, None]


class _Hidden(HandWritten):
    """A linear layer with a ReLU, which torch has as one operation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        units = torch._addmm_activation(bias, x, weight.t())
        ctx.save_for_backward(x, weight, units)
        return units

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, d_units: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, units = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dz = _aten.threshold_backward(d_units, units, 0)
        dx = product(dz, weight) if wants_x else None
        d_weight = product(dz.t(), x) if wants_weight else None
        d_bias = dz.sum(0) if wants_bias else None
        return dx, d_weight, d_bias
