"""Goodness: how strongly a block's output speaks for each class, from an auxiliary convolution (SFF) or from channel groups (CwC).

For 1 x 1 kernels the SFF goodness has two exact forms, with `y` (B, C, P) the block's output over P positions:

- direct: `z = W y + b`, `g_j = mean_p z_jp^2`, which makes a tensor of shape (B, J, P);
- second moment: with `y~ = [y; 1]`, `w~_j = [w_j; b_j]` and `M = mean_p y~ y~^T`, `g_j = w~_j^T M w~_j`, whose cost over the positions does
  not depend on J, and whose gradient is one product as well: `dL/dy = 2/P (sum_j dL/dg_j w~_j w~_j^T) y~`.

`moment_is_cheaper` chooses by counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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

# With no more positions than this, one product over all samples' positions is faster than a product for each sample, copy included; the
# second number is that of many classes.
_FEW_POSITIONS = 8
_FEW_POSITIONS_OF_MANY = 64

# Where an exported graph leaves the size of images open, heads choose their form as for so many positions.
_OPEN_POSITIONS = 196

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

    def __init__(
        self,
        channels: int,
        num_classes: int,
        channel_axis: int = 1,
        spatial: int = 2,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(
                f"kernel_size is {kernel_size!r}. Hint: pass an odd positive integer; 1 is the default"
            )
        if kernel_size > 1 and spatial > 3:
            raise InputError(
                f"kernel_size is {kernel_size}, but a value with {spatial} axes of space has no such convolution. Hint: kernel_size=1"
            )
        self.channel_axis, self.spatial = channel_axis, spatial
        self.kernel_size = kernel_size if spatial else 1
        kernel = (channels, *[self.kernel_size] * max(spatial, 1))
        self.weight = nn.Parameter(torch.empty(num_classes, *kernel))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `torch.nn` convolutions do."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens, over which alone the mean then runs.
        """
        with full_precision(y):
            wide = y if y.dtype.itemsize > 2 else y.float()
            weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
            if mask is not None:
                return token_goodness(
                    self._tokens(wide, mask.bool()), weight.flatten(1), bias, mask.bool()
                )
            if self.kernel_size > 1:
                return convolved_goodness(wide.movedim(self.channel_axis, 1), weight, bias)
            return pointwise_goodness(_positions(wide, self.channel_axis), weight.flatten(1), bias)

    def _tokens(self, y: Tensor, real: Tensor) -> Tensor:
        """Return what the weight is applied to at each token, (B, T, C); a kernel reads zeros where the padding is, as beyond the ends."""
        if self.kernel_size > 1:
            y = _zero_padded(y, real)
        return _windows(y, self.kernel_size) if self.kernel_size > 1 else y

    def extra_repr(self) -> str:
        classes, channels = self.weight.shape[:2]
        return (
            f"{channels}, {classes}, channel_axis={self.channel_axis}, "
            f"kernel_size={self.kernel_size}"
        )


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
        sizes = torch.tensor(
            [len(group) for group in torch.arange(channels).tensor_split(num_classes)]
        )
        owner = torch.arange(num_classes).repeat_interleave(sizes)
        self.register_buffer(
            "groups", F.one_hot(owner, num_classes) / sizes, persistent=False
        )  # (C, J), each column a mean

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output; `mask` as in `SFFGoodness`."""
        with full_precision(y):
            wide = y if y.dtype.itemsize > 2 else y.float()
            if mask is not None:
                real = mask.bool()
                means = _MeanSquare.apply(_positions(_zero_padded(wide, real), self.channel_axis))
                return means @ self.groups.to(wide.dtype) * _per_real_token(real, wide.dtype)
            return _MeanSquare.apply(_positions(wide, self.channel_axis)) @ self.groups.to(
                wide.dtype
            )

    def extra_repr(self) -> str:
        channels, classes = self.groups.shape
        return f"{channels}, {classes}, channel_axis={self.channel_axis}"


def token_goodness(y: Tensor, weight: Tensor, bias: Tensor, real: Tensor) -> Tensor:
    """Return the goodness over the real tokens of each sample alone, by the same forms as without padding.

    The bias becomes the weight of one more channel, which is 1 at real tokens: a token of zeros then adds nothing to a sum of squares.

    Args:
        y: (B, T, C).
        weight: (J, C).
        bias: (J,).
        real: (B, T), false at padding.
    """
    marked = _zero_padded(F.pad(y, (0, 1), value=1.0), real)
    joint = torch.cat([weight, bias[:, None]], dim=1)
    return pointwise_goodness(marked.mT, joint, torch.zeros_like(bias)) * _per_real_token(
        real, y.dtype
    )


def _windows(y: Tensor, size: int) -> Tensor:
    """Return, for each token of (B, T, C), the window around it that a convolution reads, (B, T, C * size)."""
    return F.pad(y, (0, 0, size // 2, size // 2)).unfold(1, size, 1).flatten(2)


def _zero_padded(y: Tensor, real: Tensor) -> Tensor:
    return y.masked_fill(~real[:, :, None], 0)


def _per_real_token(real: Tensor, dtype: torch.dtype) -> Tensor:
    """Return, (B, 1), what turns a mean over all tokens into one over the real ones, 1 at least being taken as real."""
    return real.shape[1] / real.sum(1, keepdim=True).clamp(min=1).to(dtype)


def pointwise_goodness(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `g[n, j] = mean_p (w_j . y[n, :, p] + b_j)^2` by the cheaper of the two exact forms.

    Args:
        y: (B, C, P), a view of any strides.
        weight: (J, C).
        bias: (J,).
    """
    positions = y.shape[2] if isinstance(y.shape[2], int) else _OPEN_POSITIONS
    by_moment = moment_is_cheaper(y.shape[1], weight.shape[0], positions)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _exported(y, weight, bias, by_moment)
    if by_moment:
        return SecondMomentGoodness.apply(y, weight, bias)
    few = _FEW_POSITIONS_OF_MANY if _many_classes(weight, positions) else _FEW_POSITIONS
    if y.mT.is_contiguous() or positions <= few:
        return DirectGoodness.apply(y.mT.contiguous(), weight, bias, ROWS)
    return DirectGoodness.apply(y, weight, bias, CHANNELS)


def _exported(y: Tensor, weight: Tensor, bias: Tensor, by_moment: bool) -> Tensor:
    """Write either form in plain operations of any batch size, for an inference graph."""
    if not by_moment:
        return (weight @ y + bias[:, None]).square().mean(2)
    mean = y.mean(2)
    centred = y - mean[:, :, None]
    covariance = centred @ centred.mT / y.shape[2]
    return (weight @ covariance * weight).sum(2) + (mean @ weight.t() + bias).square()


def _many_classes(weight: Tensor, positions: int) -> bool:
    """Whether the weight, (J, C), is large beside what one sample brings to its gradient."""
    return weight.shape[0] > 2 * positions


def moment_is_cheaper(channels: int, num_classes: int, positions: int) -> bool:
    """Whether the second-moment form costs less than the direct one, by multiply-adds and values moved for one sample's step."""
    c, j, p = channels + 1, num_classes, positions
    # Products are computed again where they were not kept.
    direct = (3 if j <= _KEEP * channels else 4) * p * c * j + _MACS_PER_VALUE * 6 * j * p
    moment = (
        2 * p * c * c + (2 if j <= channels else 3) * j * c * c + _MACS_PER_VALUE * 6 * c * (c + j)
    )
    return moment < direct


@dataclass(frozen=True)
class Form:
    """How z = W y + b is laid out, and its products.

    Attributes:
        image: z of y, weight and bias; the axes of space are all axes but the first and that of the classes.
        classes: axis of the classes in z.
        add_gradients: adds to (dy or None, dw or None, db or None) what a gradient dz gives for y and weight; dy is written over.
    """

    image: Callable[[Tensor, Tensor, Tensor], Tensor]
    classes: int
    add_gradients: Callable[..., None]

    def goodness(self, z: Tensor) -> Tensor:
        """Return the mean square over space, (B, J)."""
        if (
            self.classes == z.ndim - 1 and z.device.type == "cpu"
        ):  # where a norm over other axes than the last takes ten times a sum's time
            return torch.cat(
                [z[part].square().sum(1) for part in _small_parts(len(z), math.prod(z.shape[1:]))]
            ).div_(z.shape[1])
        space = [axis for axis in range(1, z.ndim) if axis != self.classes]
        return (
            torch.linalg.vector_norm(z, dim=space)
            .square_()
            .div_(math.prod(z.shape[axis] for axis in space))
        )


class DirectGoodness(Function):
    """The goodness by way of z, which is kept for the backward pass unless it is large against y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, form: Form) -> Tensor:
        ctx.form = form
        if weight.shape[0] <= _KEEP * weight.shape[1]:
            z = form.image(y, weight, bias)
            ctx.save_for_backward(y, weight, bias, z)
            return form.goodness(z)
        ctx.save_for_backward(y, weight, bias, None)
        return torch.cat(
            [
                form.goodness(form.image(y[part], weight, bias))
                for part in _parts(y, _image_size(y, weight))
            ]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, z = ctx.saved_tensors
        form: Form = ctx.form
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        db = torch.zeros_like(bias) if wants_bias else None
        per_sample = _image_size(y, weight)
        scale = dg * (2 * weight.shape[0] / per_sample)
        for part in _parts(y, per_sample):
            factor = _beside(scale[part], form.classes, y.ndim)
            dz = (
                z[part] * factor
                if z is not None
                else form.image(y[part], weight, bias).mul_(factor)
            )
            form.add_gradients(dz, y[part], weight, dy[part] if dy is not None else None, dw, db)
        return dy, dw, db, None


def _image_size(y: Tensor, weight: Tensor) -> int:
    """Return the number of values of z for one sample."""
    return weight.shape[0] * math.prod(y.shape[1:]) // weight.shape[1]


def _beside(values: Tensor, axis: int, ndim: int) -> Tensor:
    """View (B, J) so that it broadcasts against a tensor of `ndim` axes whose classes lie on `axis`."""
    return values.view(
        [values.shape[0], *(values.shape[1] if i == axis else 1 for i in range(1, ndim))]
    )


def _image(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return z, (B, J, P), of y, (B, C, P)."""
    return torch.baddbmm(bias[:, None], weight.expand(y.shape[0], -1, -1), y)


def _add_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, dy: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> None:
    if dy is not None:
        torch.matmul(weight.t().expand(dz.shape[0], -1, -1), dz, out=dy)
    if dw is not None:
        _add_products(dw, dz, y)
    if db is not None:
        db += dz.sum((0, 2))


def _add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the sum over samples of a b^T, a (B, J, P) and b (B, C, P), to (J, C)."""
    if a.device.type != "cpu" or _many_classes(total, a.shape[2]):
        total.addbmm_(a, b.mT)
        return
    for part in _small_parts(
        len(a), total.numel()
    ):  # `addbmm` takes one small product after the other on a CPU
        total += torch.bmm(a[part], b[part].mT).sum(0)


def _row_image(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return z in rows, (B, P, J), of y in rows, (B, P, C), as tokens lie in memory: one product over all positions of all samples."""
    return torch.addmm(bias, y.flatten(0, 1), weight.t()).view(y.shape[0], y.shape[1], len(weight))


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


def _convolution(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return z, (B, J, ...), of y, (B, C, ...), padded with zeros to the same positions."""
    return _CONVOLUTIONS[y.ndim - 2](y, weight, bias, padding=weight.shape[-1] // 2)


def _add_convolution_gradients(
    dz: Tensor, y: Tensor, weight: Tensor, dy: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> None:
    space = y.ndim - 2
    wanted = [total is not None for total in (dy, dw, db)]
    settings = (
        [1] * space,
        [weight.shape[-1] // 2] * space,
        [1] * space,
        False,
        [0] * space,
        1,
    )  # stride, padding, dilation, ..., groups
    gradients = torch.ops.aten.convolution_backward(
        dz, y, weight, [weight.shape[0]], *settings, wanted
    )
    if dy is not None:
        dy.copy_(gradients[0])
    if dw is not None:
        dw += gradients[1]
    if db is not None:
        db += gradients[2]


CHANNELS = Form(_image, 1, _add_gradients)
ROWS = Form(_row_image, 2, _add_row_gradients)
CONVOLUTION = Form(_convolution, 1, _add_convolution_gradients)


class SecondMomentGoodness(Function):
    """The goodness by way of each sample's covariance, (B, C, C), and mean, (B, C).

    `g_j = w_j^T Cov w_j + (w_j . mean + b_j)^2` is `w~_j^T M w~_j` with the second moment M split into its mean and what is around it.
    For the backward pass it keeps the product W Cov, (B, J, C), where there are no more classes than channels, and else the covariance.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = y.mean(2)
        # Centred, part by part: where the mean is large, its square would swallow the variance.
        covariance = torch.cat(
            [
                _covariance(y[part], mean[part])
                for part in _parts(y, _CENTRED_PARTS * math.prod(y.shape[1:]))
            ]
        )
        if weight.shape[0] <= weight.shape[1]:
            product = _each(weight, covariance)
            ctx.save_for_backward(y, weight, bias, mean, None, product)
            spread = (product * weight).sum(2)
        else:
            ctx.save_for_backward(y, weight, bias, mean, covariance, None)
            spread = torch.cat(
                [
                    _each(weight, covariance[part]).mul_(weight).sum(2)
                    for part in _parts(y, weight.numel())
                ]
            )
        return spread.add_(torch.addmm(bias, mean, weight.t()).square_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, covariance, product = ctx.saved_tensors
        wants_y, wants_weight, wants_bias = ctx.needs_input_grad
        dy = torch.empty_like(y) if wants_y else None
        dw = torch.zeros_like(weight) if wants_weight else None
        offset = torch.addmm(bias, mean, weight.t())  # (B, J): the mean of z
        for part in _parts(y, weight.numel()):
            scaled = weight * (2 * dg[part, :, None])  # (B, J, C)
            if dy is not None:
                form = torch.bmm(scaled.mT, weight.expand(len(scaled), -1, -1)).div_(
                    y.shape[2]
                )  # (B, C, C): sum_j dg_j w_j w_j^T
                line = torch.matmul(bias, scaled).div_(y.shape[2])
                torch.baddbmm(line[:, :, None], form, y[part], out=dy[part])
            if dw is not None and product is None:
                dw.addbmm_(scaled, covariance[part])
        if dw is not None:
            if product is not None:
                dw += (product * (2 * dg[:, :, None])).sum(0)
            dw.addmm_((2 * dg * offset).t(), mean)
        db = (2 * dg * offset).sum(0) if wants_bias else None
        return dy, dw, db


def _each(weight: Tensor, matrices: Tensor) -> Tensor:
    """Return the product with each of (B, C, C), (B, J, C); `matmul` would fold the batch into an axis, and copy its result."""
    return torch.bmm(weight.expand(len(matrices), -1, -1), matrices)


def _covariance(y: Tensor, mean: Tensor) -> Tensor:
    """Return each sample's covariance over its positions, (B, C, C)."""
    centred = y - mean[:, :, None]
    return (centred @ centred.mT).div_(y.shape[2])


def _parts(y: Tensor, per_sample: int) -> list[slice]:
    """Split the batch so that a tensor of so many values a sample is no larger, part by part, than y itself."""
    return _slices(y.shape[0], max(y.numel(), _SMALL) // per_sample)


def _small_parts(samples: int, per_sample: int) -> list[slice]:
    """Split a batch so that a tensor of so many values a sample is a small one."""
    return _slices(samples, _SMALL // max(per_sample, 1))


def _slices(samples: int, size: int) -> list[slice]:
    """Split a batch in slices of a size, 1 at least; an empty batch is one slice."""
    size = max(size, 1)
    return [slice(start, start + size) for start in range(0, max(samples, 1), size)]


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
    """Switch autocast off, where there is autocast: a tensor on "meta" has none, nor has an exported graph."""
    plain = y.device.type == "meta" or torch.compiler.is_exporting()
    return torch.autocast(y.device.type, enabled=False) if not plain else nullcontext()


def _mean_square(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=2).square_().div_(z.shape[2])


def _positions(y: Tensor, channel_axis: int) -> Tensor:
    """View a value as (B, C, P), P being the product of all other axes, 1 for flat values."""
    return y.movedim(channel_axis, 1).flatten(2) if y.ndim > 2 else y.unsqueeze(2)


def convolved_goodness(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `g[n, j] = mean over space of conv(y)[n, j]^2`, for y (B, C, ...), weight (J, C, k, ...) and bias (J,)."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _convolution(y, weight, bias).square().flatten(2).mean(2)
    return DirectGoodness.apply(y, weight, bias, CONVOLUTION)
