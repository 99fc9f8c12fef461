"""The SFF goodness by way of z = W y + b, its direct form: `g_j = mean_p z_jp^2`.

z has J values for each position. It is kept for the backward pass unless it is large beside y; else
it is computed twice, slice by slice of the batch.

Every operation here is a launch on a GPU, and most batches take one slice. So factors go into the
products, which multiply by a number at no cost, and a single slice is neither added nor joined to
anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.batch_slices import joined, slices_within
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.products import (
    add_product,
    add_products,
    product,
    product_added,
    products,
    sum_of_products,
)

# z is kept while it has no more than this many times the values of y.
KEPT_TIMES = 4

# With fewer values of z than this, the number of operations counts for more than their speed.
_SMALL = 2**18

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Gradients of y, weight and bias; None where one is not wanted.
Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
Wanted: TypeAlias = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Form:
    """A layout of z, and its products.

    Attributes:
        multiple: the number that the product multiplies z by, given the number of positions.
        project: returns this multiple of z, given y, weight, bias and the number. The axes of space
            are all axes of z but the first and that of the classes.
        class_axis: axis of the classes in z.
        squares: returns a factor times the sum of squares over space, (B, J), of a multiple of z.
        gradients: returns the gradients that dz gives, for y and weight, those that are wanted.
            That of the weight is added to a total, in place, where there is one.
    """

    multiple: Callable[[int], float]
    project: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    class_axis: int
    squares: Callable[[Tensor, float], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Wanted, Tensor | None], Gradients]

    def goodness(self, z: Tensor, positions: int) -> Tensor:
        """Return the mean square over space, (B, J), of what the product gave."""
        return self.squares(z, 1 / (positions * self.multiple(positions) ** 2))


class DirectGoodness(HandWritten):
    """The goodness, (B, J), of y in one of the forms below, weight and bias."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, form: Form) -> Tensor:
        positions = _positions(y, weight)
        multiple = form.multiple(positions)
        ctx.form = form
        if weight.shape[0] <= KEPT_TIMES * weight.shape[1]:
            z = form.project(y, weight, bias, multiple)
            ctx.save_for_backward(y, weight, bias, z)
            return form.goodness(z, positions)
        ctx.save_for_backward(y, weight, bias, None)
        goodness = []
        for part in _slices(y, weight):
            # z has no name here: it would live on while the next one is computed.
            goodness.append(form.goodness(form.project(y[part], weight, bias, multiple), positions))
        return goodness[0] if len(goodness) == 1 else torch.cat(goodness)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, z = ctx.saved_tensors
        form: Form = ctx.form
        positions = _positions(y, weight)
        multiple = form.multiple(positions)
        # dz = 2 / positions * dg * z, of which the product has given a multiple.
        needs_no_factor = form.multiple is _of_the_gradient
        scale = dg if needs_no_factor else dg * (2 / (positions * multiple))
        wanted = ctx.needs_input_grad[:3]
        sums = Sums(y, wanted)
        slices = _slices(y, weight)
        for part in slices:
            against = _against(scale[part], form.class_axis, y.ndim)
            if z is not None:
                dz = z[part] * against
            else:
                dz = form.project(y[part], weight, bias, multiple).mul_(against)
            found = form.gradients(dz, y[part], weight, wanted, sums.weight)
            if len(slices) == 1:
                return *found, None
            sums.add(part, found)
        return sums.y, sums.weight, sums.bias, None


class Sums:
    """The gradients of a batch, put together from those of its slices.

    Args:
        y: (B, ...).
        wanted: for each of y, weight and bias.
    """

    def __init__(self, y: Tensor, wanted: Wanted) -> None:
        self._like = y
        self._wants_y = wanted[0]
        self.y: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, part: slice, gradients: Gradients) -> None:
        """Add the gradients of a slice. That of the weight is the sum already."""
        dy, self.weight, db = gradients
        if dy is not None:
            if self.y is None:
                self.y = torch.empty_like(self._like)
            self.y[part] = dy
        if db is not None:
            self.bias = db if self.bias is None else self.bias.add_(db)


def _positions(y: Tensor, weight: Tensor) -> int:
    return math.prod(y.shape[1:]) // weight.shape[1]


def _slices(y: Tensor, weight: Tensor) -> list[slice]:
    """Split a batch so that z is, slice by slice, no larger than y or the weight."""
    per_sample = len(weight) * _positions(y, weight)
    return slices_within(y, per_sample, beside=weight)


def _against(values: Tensor, class_axis: int, ndim: int) -> Tensor:
    """View (B, J) so that it broadcasts against a tensor of `ndim` axes."""
    shape = [values.shape[0], *[1] * (ndim - 1)]
    shape[class_axis] = values.shape[1]
    return values.view(shape)


def _of_the_gradient(positions: int) -> float:
    """Return the multiple of z that needs no factor in the gradient: dz = dg * multiple * z."""
    return 2 / positions


def _of_z(positions: int) -> float:
    return 1.0


# Form CHANNELS: y is (B, C, P), z is (B, J, P).


def _project_channels(y: Tensor, weight: Tensor, bias: Tensor, multiple: float) -> Tensor:
    weights = weight.expand(y.shape[0], -1, -1)
    return add_products(bias[:, None], weights, y, beta=multiple, alpha=multiple)


def _squares_of_channels(z: Tensor, factor: float) -> Tensor:
    if not 0 < z.numel() < _SMALL:
        return _squares_by_norm(z, factor)
    # One operation instead of three: each row times itself. A norm reads large rows faster.
    rows = z.flatten(0, 1)
    row, column = rows[:, None], rows[:, :, None]
    # With a beta of 0, the values of the first argument do not count.
    products = torch.baddbmm(column[:, :1], row, column, beta=0, alpha=factor)
    return products.view(z.shape[:2])


def _squares_by_norm(z: Tensor, factor: float) -> Tensor:
    return torch.linalg.vector_norm(z.flatten(2), dim=2).square_().mul_(factor)


def _channel_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, wanted: Wanted, total: Tensor | None
) -> Gradients:
    dy = products(weight.t().expand(len(dz), -1, -1), dz) if wanted[0] else None
    dw = sum_of_products(total, dz, y.mT, weight) if wanted[1] else None
    db = dz.sum((0, 2)) if wanted[2] else None
    return dy, dw, db


# Form ROWS: y is (B, P, C), as tokens lie in memory, z is (B, P, J). All positions of all samples
# are the rows of one product.


def _project_rows(y: Tensor, weight: Tensor, bias: Tensor, multiple: float) -> Tensor:
    rows = add_product(bias, y.flatten(0, 1), weight.t(), multiple)
    return rows.view(y.shape[0], y.shape[1], len(weight))


def _squares_of_rows(z: Tensor, factor: float) -> Tensor:
    if z.device.type == "cpu":
        # On a CPU, a norm over any axis but the last takes ten times the time of a sum.
        total = joined(z, slices_within(z, math.prod(z.shape[1:])), _sum_of_squares)
    else:
        total = torch.linalg.vector_norm(z, dim=1).square_()
    return total if factor == 1 else total.mul_(factor)


def _sum_of_squares(z: Tensor) -> Tensor:
    squares = z.square()
    return squares.sum(1) if z.shape[1] != 1 else squares[:, 0]


def _row_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, wanted: Wanted, total: Tensor | None
) -> Gradients:
    rows = dz.flatten(0, 1)
    inputs = y.flatten(0, 1)
    dy = product(rows, weight).view(y.shape) if wanted[0] else None
    dw = product_added(total, rows.t(), inputs) if wanted[1] else None
    db = rows.sum(0) if wanted[2] else None
    return dy, dw, db


# Form CONVOLUTION: y is (B, C, ...), z is (B, J, ...) at the same positions.


def convolve(y: Tensor, weight: Tensor, bias: Tensor, multiple: float = 1.0) -> Tensor:
    """Return z of y, padded with zeros so that z has a position for each of y."""
    assert multiple == 1  # a convolution multiplies by nothing
    return _CONVOLUTIONS[y.ndim - 2](y, weight, bias, padding=weight.shape[-1] // 2)


def _convolution_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, wanted: Wanted, total: Tensor | None
) -> Gradients:
    space = y.ndim - 2
    padding = weight.shape[-1] // 2
    dy, dw, db = torch.ops.aten.convolution_backward(
        dz,
        y,
        weight,
        bias_sizes=[weight.shape[0]],
        stride=[1] * space,
        padding=[padding] * space,
        dilation=[1] * space,
        transposed=False,
        output_padding=[0] * space,
        groups=1,
        output_mask=wanted,
    )
    if dw is not None and total is not None:
        dw = total.add_(dw)
    return dy, dw, db


CHANNELS = Form(_of_the_gradient, _project_channels, 1, _squares_of_channels, _channel_gradients)
ROWS = Form(_of_the_gradient, _project_rows, 2, _squares_of_rows, _row_gradients)
CONVOLUTION = Form(_of_z, convolve, 1, _squares_by_norm, _convolution_gradients)
