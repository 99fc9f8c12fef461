"""A goodness by direction: the cosine between what a block says of a sample and a learned direction for each class.

It is not the paper's. Where an auxiliary convolution's mean square begins flat and grows without bound, a cosine has a gradient from the
first step on and is bounded, which teaches small blocks more. With a hidden layer before it a block need not make its classes linearly
separable itself, and keeps what later blocks can use, as the auxiliary networks of Belilovsky et al. (arXiv 1901.08164) let it (README,
"Heads").
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.learning.goodness import full_precision

_POOLS = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class CosineGoodness(nn.Module):
    """`g[n, j] = scale * cos(w_j, v_n)`, v being a sample's features by region, less their mean; or what a hidden layer makes of these.

    Images are pooled to so many regions along each axis of space, two of which make v have 4 C features, and volumes likewise; of tokens it
    is their mean, of flat values the values.

    Args:
        channels: C of the block's output.
        num_classes: J.
        channel_axis: axis of the channels in the batched output, as in `SFFGoodness`.
        spatial: number of axes besides batch and channels.
        regions: along each axis of space of images and volumes. More let small images and early blocks learn more, and cost parameters.
        scale: by which the cosine is multiplied: the inverse of the softmax's temperature.
        hidden: number of units, with a ReLU, between the features and the cosine; None leaves them out.

    Raises:
        InputError: there is no more than one feature, or hidden unit.

    Attributes:
        weight: (J, features or hidden); only the direction of its rows counts.
        hidden: the linear layer to the hidden units, of features with a mean of 0 and a variance of 1, or None.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        channel_axis: int = 1,
        spatial: int = 2,
        regions: int = 2,
        scale: float = 10.0,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.channel_axis, self.spatial, self.regions, self.scale = (
            channel_axis,
            spatial,
            regions,
            scale,
        )
        features = channels * (regions**spatial if spatial in _POOLS else 1)
        if (
            min(features, 2 if hidden is None else hidden) < 2
        ):  # a single value, less its mean, is 0
            number = f"{features} feature" if features < 2 else f"{hidden} hidden unit"
            raise InputError(
                f"a cosine of {number} has no direction. Hint: goodness='sff' for such a block, and 2 hidden units at least"
            )
        self.hidden = nn.Linear(features, hidden) if hidden is not None else None
        self.weight = nn.Parameter(torch.empty(num_classes, features if hidden is None else hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.hidden is not None:
            self.hidden.reset_parameters()

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the goodness (B, J), in float32 or wider, of a block's output.

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens, over which alone the mean then runs.
        """
        with full_precision(y):
            wide = (y if y.dtype.itemsize > 2 else y.float()).movedim(self.channel_axis, 1)
            features = _direction(
                self._pooled(wide) if mask is None else _mean_of_real(wide, mask.bool())
            )
            if self.hidden is not None:
                even = features * math.sqrt(features.shape[1])
                features = _direction(
                    F.linear(
                        even, self.hidden.weight.to(wide.dtype), self.hidden.bias.to(wide.dtype)
                    ).relu()
                )
            return F.linear(features, self.scale * _length_one(self.weight.to(wide.dtype)))

    def _pooled(self, y: Tensor) -> Tensor:
        """Return the features by region, (B, features), of (B, C, ...)."""
        if self.spatial in _POOLS:
            # ONNX has no operator for regions of images whose size is open.
            pooled = (
                _by_products(y, self.regions)
                if torch.compiler.is_exporting()
                else _POOLS[self.spatial](y, self.regions)
            )
            return pooled.flatten(1)
        return y.flatten(2).mean(2) if y.ndim > 2 else y

    def extra_repr(self) -> str:
        classes, features = (
            len(self.weight),
            self.weight.shape[1] if self.hidden is None else self.hidden.in_features,
        )
        return f"{features}, {classes}, channel_axis={self.channel_axis}, regions={self.regions}, scale={self.scale:g}"


def _by_products(y: Tensor, regions: int) -> Tensor:
    """Return the means by region, (B, C, regions, ...), of (B, C, ...): adaptive average pooling, as a product for each axis of space."""
    for axis in range(2, y.ndim):
        size = y.shape[axis]
        place, region = (
            torch.arange(size, device=y.device),
            torch.arange(regions, device=y.device)[:, None],
        )
        start, end = size * region // regions, (size * (region + 1) + regions - 1) // regions
        share = ((start <= place) & (place < end)).to(y.dtype) / (end - start)  # (regions, size)
        y = (y.movedim(axis, -1) @ share.t()).movedim(-1, axis)
    return y


def _direction(features: Tensor) -> Tensor:
    """Return rows (N, features), less the mean of each, of length 1."""
    return _length_one(features - features.mean(1, keepdim=True))


def _length_one(features: Tensor, eps: float = 1e-5) -> Tensor:
    """Return rows (N, features) of length 1, but shorter where a row is nearly zero: its direction would be noise, with a vast gradient."""
    mean_square = features.square().mean(1, keepdim=True)
    return features * torch.rsqrt(mean_square + eps) / math.sqrt(features.shape[1])


def _mean_of_real(y: Tensor, real: Tensor) -> Tensor:
    """Return the mean of each sample's real tokens, (B, C), of (B, C, T)."""
    return y.masked_fill(~real[:, None], 0).sum(2) / real.sum(1, keepdim=True).clamp(min=1).to(
        y.dtype
    )
