"""Slices of a batch, so that what is computed slice by slice stays small."""

from __future__ import annotations

from torch import Tensor

# A batch is not split for the sake of tensors with fewer values than this.
_SMALL = 2**18


def slices_within(y: Tensor, per_sample: int) -> list[slice]:
    """Split the batch y so that a tensor beside it is, slice by slice, no larger than y.

    Args:
        y: (B, ...).
        per_sample: the number of values that the other tensor has for one sample.
    """
    return _slices(y.shape[0], max(y.numel(), _SMALL) // per_sample)


def small_slices(samples: int, per_sample: int) -> list[slice]:
    """Split a batch so that a tensor with so many values for each sample is a small one."""
    return _slices(samples, _SMALL // max(per_sample, 1))


def _slices(samples: int, size: int) -> list[slice]:
    """Split a batch into slices of a size, at least 1; an empty batch is one slice."""
    size = max(size, 1)
    starts = range(0, max(samples, 1), size)
    return [slice(start, start + size) for start in starts]
