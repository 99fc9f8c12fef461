"""The SFF goodness and the mean square, with little memory.

For 1 x 1 kernels the SFF goodness of y, (B, C, P), has two exact forms:

- direct (`sffx.kernels.direct_form`): `z = W y + b`, `g_j = mean_p z_jp^2`, with a tensor of shape
  (B, J, P);
- second moment (`sffx.kernels.moment_form`): `g_j = w~_j^T M w~_j`, whose cost over the positions
  does not depend on J.

`moment_is_cheaper` estimates both costs, and `pointwise_goodness` takes the cheaper form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.direct_form import (
    CHANNELS,
    CONVOLUTION,
    KEPT_TIMES,
    ROWS,
    DirectGoodness,
    convolve,
)
from sffx.kernels.moment_form import SecondMomentGoodness
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.padding import per_real_token, zero_padded
from sffx.kernels.products import has_many_classes

# A value moved through memory takes the time of about so many multiply-adds, on CPUs and GPUs.
_MACS_PER_VALUE = 8

# With few positions, one product over the positions of all samples is faster on a CPU than one
# product for each sample, even if y must be copied for it. With many classes the limit is higher.
_FEW_POSITIONS = 8
_FEW_POSITIONS_OF_MANY = 64

# An exported graph may leave the image size open. The form is then chosen for this many positions.
_OPEN_POSITIONS = 196


def pointwise_goodness(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `g[n, j] = mean_p (w_j . y[n, :, p] + b_j)^2`, (B, J), by the cheaper form.

    Args:
        y: (B, C, P), a view of any strides.
        weight: (J, C).
        bias: (J,).
    """
    positions = y.shape[2] if isinstance(y.shape[2], int) else _OPEN_POSITIONS
    by_moment = moment_is_cheaper(y.shape[1], weight.shape[0], positions)
    if _is_inference_graph():
        return _in_plain_operations(y, weight, bias, by_moment)
    if by_moment:
        return SecondMomentGoodness.apply(y, weight, bias)
    many_classes = has_many_classes(weight, positions)
    few_positions = _FEW_POSITIONS_OF_MANY if many_classes else _FEW_POSITIONS
    rows = y.mT
    is_copied = y.device.type == "cpu" and positions <= few_positions
    if rows.is_contiguous() or is_copied:
        return DirectGoodness.apply(rows.contiguous(), weight, bias, ROWS)
    return DirectGoodness.apply(y, weight, bias, CHANNELS)


def convolved_goodness(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `g[n, j] = mean over space of conv(y)[n, j]^2`, (B, J).

    Args:
        y: (B, C, ...).
        weight: (J, C, k, ...).
        bias: (J,).
    """
    if _is_inference_graph():
        return convolve(y, weight, bias).square().flatten(2).mean(2)
    return DirectGoodness.apply(y, weight, bias, CONVOLUTION)


def token_goodness(y: Tensor, weight: Tensor, bias: Tensor, real: Tensor) -> Tensor:
    """Return the goodness over the real tokens of each sample, (B, J), by the cheaper form.

    Args:
        y: (B, T, C).
        weight: (J, C).
        bias: (J,).
        real: (B, T), false at padding.
    """
    # The bias becomes the weight of one more channel, which is 1 at real tokens. A token of zeros
    # then adds nothing to a sum of squares.
    marked = zero_padded(F.pad(y, (0, 1), value=1.0), real)
    joint = torch.cat([weight, bias[:, None]], dim=1)
    no_bias = torch.zeros_like(bias)
    mean_over_all = pointwise_goodness(marked.mT, joint, no_bias)
    return mean_over_all * per_real_token(real, y.dtype)


def moment_is_cheaper(channels: int, num_classes: int, positions: int) -> bool:
    """Return whether the second-moment form costs less than the direct one.

    The cost is that of one sample's step: multiply-adds, and values moved through memory.
    """
    # The bias counts as the weight of one more channel.
    c = channels + 1
    j = num_classes
    p = positions
    # A product that was not kept is computed once more in the backward pass.
    direct_products = 3 if j <= KEPT_TIMES * channels else 4
    moment_products = 2 if j <= channels else 3
    direct_macs = direct_products * p * c * j
    moment_macs = 2 * p * c * c + moment_products * j * c * c
    # How often a step reads and writes z, the products, and y, of which one form makes a centred
    # copy.
    direct_moves = 7 * j * p + 3 * c * p
    moment_moves = 6 * c * (c + j) + 7 * c * p
    direct = direct_macs + _MACS_PER_VALUE * direct_moves
    moment = moment_macs + _MACS_PER_VALUE * moment_moves
    # Where they cost about the same, the second moment needs less memory.
    return moment < 1.02 * direct


def as_positions(y: Tensor, channel_axis: int) -> Tensor:
    """View a value as (B, C, P), with P the product of all other axes, 1 for flat values."""
    if y.ndim == 2:
        return y.unsqueeze(2)
    return y.movedim(channel_axis, 1).flatten(2)


def mean_square(y: Tensor) -> Tensor:
    """Return the mean square over the last axis, (B, C, P) to (B, C), without a squared copy."""
    return _MeanSquare.apply(y)


class _MeanSquare(HandWritten):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.linalg.vector_norm(y, dim=2).square_().div_(y.shape[2])

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, dg: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (dg * (2 / y.shape[2]))[:, :, None]


def _is_inference_graph() -> bool:
    """Return whether a graph for inference is being made, which cannot hold autograd functions."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _in_plain_operations(y: Tensor, weight: Tensor, bias: Tensor, by_moment: bool) -> Tensor:
    """Return the goodness by operations that an exporter knows, for any batch size."""
    if not by_moment:
        z = weight @ y + bias[:, None]
        return z.square().mean(2)
    # The mean square of z is its variance plus the square of its mean.
    mean = y.mean(2)
    centred = y - mean[:, :, None]
    covariance = centred @ centred.mT / y.shape[2]
    variance_of_z = (weight @ covariance * weight).sum(2)
    mean_of_z = mean @ weight.t() + bias
    return variance_of_z + mean_of_z.square()
