"""The SFF goodness by way of z = W y + b, its direct form: `g_j = mean_p z_jp^2`.

z has J values for each position. It is kept for the backward pass unless it is large beside y; else
it is computed twice, slice by slice of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sffx.kernels.batch_slices import joined, slices_within, small_slices

# z is kept while it has no more than this many times the values of y.
KEPT_TIMES = 4

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Form:
    """A layout of z, and its products.

    Attributes:
        project: returns z, given y, weight and bias. The axes of space are all axes of z but the
            first and that of the classes.
        class_axis: axis of the classes in z.
        add_gradients: adds to (dy, dw, db) what a gradient dz gives, for y and weight. Each of the
            three may be None, if it is not wanted. dy is written over.
    """

    project: Callable[[Tensor, Tensor, Tensor], Tensor]
    class_axis: int
    add_gradients: Callable[..., None]

    def goodness(self, z: Tensor) -> Tensor:
        """Return the mean square over space, (B, J)."""
        if self.class_axis == z.ndim - 1 and z.device.type == "cpu":
            return _mean_square_of_rows(z)
        space = [axis for axis in range(1, z.ndim) if axis != self.class_axis]
        positions = math.prod([z.shape[axis] for axis in space])
        return torch.linalg.vector_norm(z, dim=space).square_().div_(positions)


def _mean_square_of_rows(z: Tensor) -> Tensor:
    """Return the mean square over axis 1 of (B, P, J).

    On a CPU, a norm over any axis but the last takes ten times the time of a sum.
    """
    slices = small_slices(z, math.prod(z.shape[1:]))
    return joined(z, slices, _sum_of_squares).div_(z.shape[1])


def _sum_of_squares(z: Tensor) -> Tensor:
    return z.square().sum(1)


class DirectGoodness(Function):
    """The goodness, (B, J), of y in one of the forms below, weight and bias."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, form: Form) -> Tensor:
        ctx.form = form
        if weight.shape[0] <= KEPT_TIMES * weight.shape[1]:
            z = form.project(y, weight, bias)
            ctx.save_for_backward(y, weight, bias, z)
            return form.goodness(z)
        ctx.save_for_backward(y, weight, bias, None)
        goodness = []
        for part in slices_within(y, _size_of_z(y, weight)):
            # z has no name here: it would live on while the next one is computed.
            goodness.append(form.goodness(form.project(y[part], weight, bias)))
        return torch.cat(goodness)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, z = ctx.saved_tensors
        form: Form = ctx.form
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        db = torch.zeros_like(bias) if wants_bias else None
        per_sample = _size_of_z(y, weight)
        positions = per_sample // weight.shape[0]
        scale = dg * (2 / positions)
        for part in slices_within(y, per_sample):
            factor = _against(scale[part], form.class_axis, y.ndim)
            if z is not None:
                dz = z[part] * factor
            else:
                dz = form.project(y[part], weight, bias).mul_(factor)
            dy_part = dy[part] if dy is not None else None
            form.add_gradients(dz, y[part], weight, dy_part, dw, db)
        return dy, dw, db, None


def _size_of_z(y: Tensor, weight: Tensor) -> int:
    """Return the number of values of z for one sample."""
    return weight.shape[0] * math.prod(y.shape[1:]) // weight.shape[1]


def _against(values: Tensor, class_axis: int, ndim: int) -> Tensor:
    """View (B, J) so that it broadcasts against a tensor of `ndim` axes."""
    shape = [values.shape[0], *[1] * (ndim - 1)]
    shape[class_axis] = values.shape[1]
    return values.view(shape)


def has_many_classes(weight: Tensor, positions: int) -> bool:
    """Return whether the weight, (J, C), is large beside what one sample adds to its gradient."""
    return weight.shape[0] > 2 * positions


# Form CHANNELS: y is (B, C, P), z is (B, J, P).


def _project_channels(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], weight.expand(y.shape[0], -1, -1), y)


def _add_channel_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, dy: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> None:
    if dy is not None:
        torch.matmul(weight.t().expand(dz.shape[0], -1, -1), dz, out=dy)
    if dw is not None:
        _add_products(dw, dz, y)
    if db is not None:
        db += dz.sum((0, 2))


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the sum over samples of a b^T, for a (B, J, P) and b (B, C, P), to total (J, C)."""
    if a.device.type != "cpu" or has_many_classes(total, a.shape[2]):
        total.addbmm_(a, b.mT)
        return
    # On a CPU, `addbmm` computes one small product after the other.
    for part in small_slices(a, total.numel()):
        total += torch.bmm(a[part], b[part].mT).sum(0)


# Form ROWS: y is (B, P, C), as tokens lie in memory, z is (B, P, J). All positions of all samples
# are the rows of one product.


def _project_rows(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch.addmm(bias, y.flatten(0, 1), weight.t())
    return rows.view(y.shape[0], y.shape[1], len(weight))


def _add_row_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, dy: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> None:
    rows = dz.flatten(0, 1)
    if dy is not None:
        torch.mm(rows, weight, out=dy.flatten(0, 1))
    if dw is not None:
        dw.addmm_(rows.t(), y.flatten(0, 1))
    if db is not None:
        db += rows.sum(0)


# Form CONVOLUTION: y is (B, C, ...), z is (B, J, ...) at the same positions.


def convolve(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return z of y, padded with zeros so that z has a position for each of y."""
    return _CONVOLUTIONS[y.ndim - 2](y, weight, bias, padding=weight.shape[-1] // 2)


def _add_convolution_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, dy: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> None:
    space = y.ndim - 2
    padding = weight.shape[-1] // 2
    gradients = torch.ops.aten.convolution_backward(
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
        output_mask=[dy is not None, dw is not None, db is not None],
    )
    if dy is not None:
        dy.copy_(gradients[0])
    if dw is not None:
        dw += gradients[1]
    if db is not None:
        db += gradients[2]


CHANNELS = Form(_project_channels, 1, _add_channel_gradients)
ROWS = Form(_project_rows, 2, _add_row_gradients)
CONVOLUTION = Form(convolve, 1, _add_convolution_gradients)
