"""Goodness: how strongly a block's output speaks for each class, from an auxiliary convolution (SFF) or from channel groups (CwC).

For 1 x 1 kernels the SFF goodness has two exact forms, with `y` (B, C, P) the block's output over P positions:

- direct: `z = W y + b`, `g_j = mean_p z_jp^2`, which makes a tensor of shape (B, J, P);
- second moment: with `y~ = [y; 1]`, `w~_j = [w_j; b_j]` and `M = mean_p y~ y~^T`, `g_j = w~_j^T M w~_j`, whose cost over the positions does
  not depend on J, and whose gradient is one product as well: `dL/dy = 2/P (sum_j dL/dg_j w~_j w~_j^T) y~`.

`moment_is_cheaper` chooses by counting.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sffx.errors import InputError

# A value moved through memory costs about as much time as this many multiply-adds, on CPUs and GPUs alike.
_MACS_PER_VALUE = 8

# z is kept for the backward pass while it has no more than this many times the values of y; beyond, it is computed again part by part.
_KEEP = 4
# The centred copy of y, which the covariance needs, is made for about this part of a batch at a time.
_CENTRED_PARTS = 8
# Batches are not split for the sake of tensors below this many values.
_SMALL = 2**18

# With no more positions than this, one product over all samples' positions is faster than a product for each sample, copy included.
_FEW_POSITIONS = 8

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class SFFGoodness(nn.Module):
    """The auxiliary convolution and its goodness (section 4.3, step 2): `g[n, j] = mean over space of conv_k(Y)[n, j]^2`.

    Args:
        channels: C of the block's output.
        num_classes: J.
        channel_axis: axis of the channels in the batched output, 1 for (B, C, H, W) or (B, C), 2 for (B, T, C), 3 for (B, H, W, C).
        spatial: number of axes besides batch and channels; 0 for flat values.
        kernel_size: k of the convolution, odd; its borders are padded with zeros, so that every output has a position for every input.
            Flat values have no space to convolve over: there, k is 1.

    Attributes:
        weight: (J, C, k, ...), initialised as a `torch.nn` convolution is.
        bias: (J,).
    """

    def __init__(self, channels: int, num_classes: int, channel_axis: int = 1, spatial: int = 2, kernel_size: int = 1) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size is {kernel_size!r}. Hint: pass an odd positive integer; 1 is the default")
        if kernel_size > 1 and spatial > 3:
            raise InputError(
                f"kernel_size is {kernel_size}, but a value with {spatial} axes of space has no such convolution. Hint: kernel_size=1"
            )
        self.channel_axis, self.spatial = channel_axis, spatial
        self.kernel_size = kernel_size if spatial else 1
        self.weight = nn.Parameter(torch.empty(num_classes, channels, *[self.kernel_size] * max(spatial, 1)))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `torch.nn` convolutions do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output."""
        with full_precision(y):
            wide = y if y.dtype.itemsize > 2 else y.float()
            weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
            if self.kernel_size > 1:
                return _convolved(wide.movedim(self.channel_axis, 1), weight, bias)
            return pointwise_goodness(_positions(wide, self.channel_axis), weight.flatten(1), bias)

    def extra_repr(self) -> str:
        classes, channels = self.weight.shape[:2]
        return f"{channels}, {classes}, channel_axis={self.channel_axis}, kernel_size={self.kernel_size}"


class CwCGoodness(nn.Module):
    """The modified channel-wise competitive goodness (sections 2.3.1, 2.3.2): the mean square of each class's group of channels.

    The C channels are split over the J classes in order and as evenly as can be: where J does not divide C, the first C mod J groups have
    one channel more. There are no parameters.

    Raises:
        InputError: there are fewer channels than classes.
    """

    groups: Tensor

    def __init__(self, channels: int, num_classes: int, channel_axis: int = 1) -> None:
        super().__init__()
        if num_classes > channels:
            raise InputError(
                f"CwC needs a channel for each class, but a block has {channels} channels for {num_classes} classes. "
                "Hint: use goodness='sff', or a policy whose blocks end with more channels"
            )
        self.channel_axis = channel_axis
        sizes = torch.tensor([len(group) for group in torch.arange(channels).tensor_split(num_classes)])
        owner = torch.arange(num_classes).repeat_interleave(sizes)
        self.register_buffer("groups", F.one_hot(owner, num_classes) / sizes, persistent=False)  # (C, J), each column a mean

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output."""
        with full_precision(y):
            wide = y if y.dtype.itemsize > 2 else y.float()
            return _MeanSquare.apply(_positions(wide, self.channel_axis)) @ self.groups.to(wide.dtype)

    def extra_repr(self) -> str:
        channels, classes = self.groups.shape
        return f"{channels}, {classes}, channel_axis={self.channel_axis}"


def pointwise_goodness(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `g[n, j] = mean_p (w_j . y[n, :, p] + b_j)^2` by the cheaper of the two exact forms.

    Args:
        y: (B, C, P), a view of any strides.
        weight: (J, C).
        bias: (J,).
    """
    by_moment = moment_is_cheaper(y.shape[1], weight.shape[0], y.shape[2])
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _exported(y, weight, bias, by_moment)
    if by_moment:
        return SecondMomentGoodness.apply(y, weight, bias)
    if y.mT.is_contiguous() or y.shape[2] <= _FEW_POSITIONS:
        return RowGoodness.apply(y.mT.contiguous(), weight, bias)
    return DirectGoodness.apply(y, weight, bias)


def _exported(y: Tensor, weight: Tensor, bias: Tensor, by_moment: bool) -> Tensor:
    """Write either form in plain operations of any batch size, for an inference graph."""
    if not by_moment:
        return (weight @ y + bias[:, None]).square().mean(2)
    mean = y.mean(2)
    centred = y - mean[:, :, None]
    covariance = centred @ centred.mT / y.shape[2]
    return (weight @ covariance * weight).sum(2) + (mean @ weight.t() + bias).square()


def moment_is_cheaper(channels: int, num_classes: int, positions: int) -> bool:
    """Whether the second-moment form costs less than the direct one, by multiply-adds and values moved for one sample's step."""
    c, j, p = channels + 1, num_classes, positions
    products = 3 if num_classes <= _KEEP * channels else 4  # z = W y is computed again where it was not kept
    direct = products * p * c * j + _MACS_PER_VALUE * 6 * j * p
    moment = 2 * p * c * c + 3 * j * c * c + _MACS_PER_VALUE * 6 * c * c
    return moment < direct


class DirectGoodness(Function):
    """The goodness by way of z, (B, J, P), which is kept for the backward pass unless it is large against y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if weight.shape[0] <= _KEEP * y.shape[1]:
            z = _image(y, weight, bias)
            ctx.save_for_backward(y, weight, bias, z)
            return _mean_square(z)
        ctx.save_for_backward(y, weight, bias, None)
        per_sample = weight.shape[0] * y.shape[2]
        return torch.cat([_mean_square(_image(y[part], weight, bias)) for part in _parts(y, per_sample)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, z = ctx.saved_tensors
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        db = torch.zeros_like(bias) if wants_bias else None
        scale = dg * (2 / y.shape[2])
        for part in _parts(y, weight.shape[0] * y.shape[2]):
            dz = z[part] * scale[part, :, None] if z is not None else _image(y[part], weight, bias).mul_(scale[part, :, None])
            if dy is not None:
                torch.matmul(weight.t().expand(dz.shape[0], -1, -1), dz, out=dy[part])
            if dw is not None:
                dw.addbmm_(dz, y[part].mT)
            if db is not None:
                db += dz.sum((0, 2))
        return dy, dw, db


class RowGoodness(Function):
    """The direct goodness of y in rows, (B, P, C), as tokens lie in memory: one product over all positions of all samples."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if weight.shape[0] <= _KEEP * y.shape[2]:
            z = _row_image(y, weight, bias)
            ctx.save_for_backward(y, weight, bias, z)
            return _mean_square(z, 1)
        ctx.save_for_backward(y, weight, bias, None)
        return torch.cat([_mean_square(_row_image(y[part], weight, bias), 1) for part in _parts(y, weight.shape[0] * y.shape[1])])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, z = ctx.saved_tensors
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        db = torch.zeros_like(bias) if wants_bias else None
        scale = dg * (2 / y.shape[1])
        for part in _parts(y, weight.shape[0] * y.shape[1]):
            dz = z[part] * scale[part, None] if z is not None else _row_image(y[part], weight, bias).mul_(scale[part, None])
            rows = dz.flatten(0, 1)
            if dy is not None:
                torch.mm(rows, weight, out=dy[part].flatten(0, 1))
            if dw is not None:
                dw.addmm_(rows.t(), y[part].flatten(0, 1))
            if db is not None:
                db += rows.sum(0)
        return dy, dw, db


class SecondMomentGoodness(Function):
    """The goodness by way of each sample's covariance, (B, C, C), and mean, (B, C), which are kept for the backward pass.

    `g_j = w_j^T Cov w_j + (w_j . mean + b_j)^2` is `w~_j^T M w~_j` with the second moment M split into its mean and what is around it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = y.mean(2)
        # Centred, part by part: where the mean is large, its square would swallow the variance.
        covariance = torch.cat([_covariance(y[part], mean[part]) for part in _parts(y, _CENTRED_PARTS * y[0].numel())])
        ctx.save_for_backward(y, weight, bias, covariance, mean)
        spread = [torch.einsum("bjc,jc->bj", weight @ covariance[part], weight) for part in _parts(y, weight.numel())]
        return torch.cat(spread).add_(torch.addmm(bias, mean, weight.t()).square_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, covariance, mean = ctx.saved_tensors
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        scale = dg * (2 / y.shape[2])
        offset = torch.addmm(bias, mean, weight.t())  # (B, J): the mean of z
        for part in _parts(y, weight.numel()):
            if dy is not None:
                form = (weight.t() * scale[part, None]) @ weight  # (B, C, C): sum_j dg_j w_j w_j^T
                torch.baddbmm(((scale[part] * bias) @ weight)[:, :, None], form, y[part], out=dy[part])
            if dw is not None:
                dw += torch.einsum("bjc,bj->jc", weight @ covariance[part], 2 * dg[part])
        if dw is not None:
            dw.addmm_((2 * dg * offset).t(), mean)
        db = (2 * dg * offset).sum(0) if wants_bias else None
        return dy, dw, db


def _image(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return z, (B, J, P)."""
    return torch.baddbmm(bias[:, None], weight.expand(y.shape[0], -1, -1), y)


def _row_image(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return z in rows, (B, P, J)."""
    return torch.addmm(bias, y.flatten(0, 1), weight.t()).view(y.shape[0], y.shape[1], -1)


def _covariance(y: Tensor, mean: Tensor) -> Tensor:
    """Return each sample's covariance over its positions, (B, C, C)."""
    centred = y - mean[:, :, None]
    return (centred @ centred.mT).div_(y.shape[2])


def _parts(y: Tensor, per_sample: int) -> list[slice]:
    """Split the batch so that a tensor of so many values a sample is no larger, part by part, than y itself."""
    size = max(1, max(y.numel(), _SMALL) // per_sample)
    return [slice(start, start + size) for start in range(0, y.shape[0], size)]


class _MeanSquare(Function):
    """The mean square over the last axis, (B, C, P) to (B, C), without a squared copy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return _mean_square(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (dg * (2 / y.shape[2]))[:, :, None]


def full_precision(y: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off, where there is autocast: a tensor on "meta" has none."""
    return torch.autocast(y.device.type, enabled=False) if y.device.type != "meta" else nullcontext()


def _mean_square(z: Tensor, axis: int = 2) -> Tensor:
    return torch.linalg.vector_norm(z, dim=axis).square_().div_(z.shape[axis])


def _positions(y: Tensor, channel_axis: int) -> Tensor:
    """View a value as (B, C, P), P being the product of all other axes, 1 for flat values."""
    return y.movedim(channel_axis, 1).flatten(2) if y.ndim > 2 else y.unsqueeze(2)


def _convolved(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = _CONVOLUTIONS[y.ndim - 2](y, weight, bias, padding=weight.shape[-1] // 2)
    return z.square().flatten(2).mean(2)


HEADS = ("sff", "cwc")


def make_head(goodness: str, channels: int, num_classes: int, channel_axis: int, spatial: int, kernel_size: int) -> nn.Module:
    """Return the head that computes the named goodness.

    Raises:
        InputError: there is no such goodness, or it cannot be computed for these channels and classes.
    """
    if goodness == "sff":
        return SFFGoodness(channels, num_classes, channel_axis, spatial, kernel_size)
    if goodness == "cwc":
        return CwCGoodness(channels, num_classes, channel_axis)
    raise InputError(f"there is no goodness {goodness!r}. Hint: choose one of {', '.join(map(repr, HEADS))}")
