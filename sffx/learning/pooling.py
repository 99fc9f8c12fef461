"""The features of a sample: its output, pooled over space or over real tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def is_pooled(spatial: int) -> bool:
    """Return whether a value with so many axes of space is pooled to regions."""
    return spatial in _POOLS


def num_features(channels: int, spatial: int, regions: int) -> int:
    """Return how many features `features_of` gives for each sample.

    Args:
        channels: C.
        spatial: number of axes besides batch and channels.
        regions: along each axis of space of images and volumes.
    """
    return channels * regions**spatial if is_pooled(spatial) else channels


def features_of(y: Tensor, mask: Tensor | None, spatial: int, regions: int) -> Tensor:
    """Return the pooled features of each sample, (B, features), of y (B, C, ...).

    Args:
        y: the output of a block.
        mask: (B, T), nonzero at real tokens, over which the mean then runs; or None.
        spatial: number of axes besides batch and channels.
        regions: along each axis of space of images and volumes.
    """
    if mask is not None:
        return mean_of_real(y, mask.bool())
    return pooled_by_regions(y, spatial, regions)


def pooled_by_regions(y: Tensor, spatial: int, regions: int) -> Tensor:
    """Return the features by region, (B, features), of y (B, C, ...).

    Args:
        y: images or volumes; of other values the mean over space is taken.
        spatial: number of axes besides batch and channels.
        regions: along each axis of space of images and volumes.
    """
    if spatial not in _POOLS:
        return y.flatten(2).mean(2) if y.ndim > 2 else y
    if torch.compiler.is_exporting():
        # ONNX has no operator for regions of images whose size is open.
        return _pooled_by_products(y, regions).flatten(1)
    if all(size == regions for size in y.shape[2:]):
        return y.flatten(1)  # a region is one place
    return _POOLS[spatial](y, regions).flatten(1)


def mean_of_real(y: Tensor, real: Tensor) -> Tensor:
    """Return the mean of each sample's real tokens, (B, C), of y (B, C, T)."""
    total = y.masked_fill(~real[:, None], 0).sum(2)
    count = real.sum(1, keepdim=True).clamp(min=1)
    return total / count.to(y.dtype)


def _pooled_by_products(y: Tensor, regions: int) -> Tensor:
    """Return the means by region, (B, C, regions, ...), of y (B, C, ...).

    This is adaptive average pooling, written as a product for each axis of space.
    """
    for axis in range(2, y.ndim):
        # The bounds of a region are rounded outwards, so neighbours may share a place.
        size = y.shape[axis]
        place = torch.arange(size, device=y.device)
        region = torch.arange(regions, device=y.device)[:, None]
        start = size * region // regions
        end = (size * (region + 1) + regions - 1) // regions
        is_inside = (start <= place) & (place < end)  # (regions, size)
        shares = is_inside.to(y.dtype) / (end - start)
        y = (y.movedim(axis, -1) @ shares.t()).movedim(-1, axis)
    return y
