"""Slices of a batch, so that what is computed slice by slice stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# A batch is not split for the sake of tensors with fewer values than this.
_SMALL = 2**18

# How many callers only count memory at the moment; see `counting`.
_counting = 0


@contextmanager
def counting() -> Iterator[None]:
    """Pass over most slices of fake tensors, for who counts memory and reads no result.

    A large batch has many slices, which all take the same memory. The first two and the last two
    have the same peak, in a time that does not grow with the batch.
    """
    global _counting
    _counting += 1
    try:
        yield
    finally:
        _counting -= 1


def joined(y: Tensor, slices: list[slice], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the results of each slice of a batch y, one behind the other."""
    results: list[Tensor] = []
    done = 0
    for part in slices:
        if part.start > done:
            # Slices that were passed over; see `counting`.
            like = results[0]
            results.append(like.new_empty(part.start - done, *like.shape[1:]))
        results.append(compute(y[part]))
        done = part.stop
    return results[0] if len(results) == 1 else torch.cat(results)


def slices_within(y: Tensor, per_sample: int, beside: Tensor | None = None) -> list[slice]:
    """Split the batch y so that a tensor beside it is, slice by slice, no larger than y.

    Args:
        y: (B, ...).
        per_sample: the number of values that the other tensor has for one sample.
        beside: a tensor that may be larger than y. The other one may then be as large as it is.
    """
    largest = max(y.numel(), _SMALL)
    if beside is not None:
        largest = max(largest, beside.numel())
    return _slices(y.shape[0], largest // per_sample)


def small_slices(y: Tensor, per_sample: int) -> list[slice]:
    """Split the batch y so that a tensor with so many values for each sample is a small one.

    While counting, these are the first two and the last two. So the caller must write into what is
    there, or use `joined`.
    """
    size = max(_SMALL // max(per_sample, 1), 1)
    starts: Sequence[int] = range(0, max(len(y), 1), size)
    # Only fake tensors: another thread may train at the same time.
    if _counting and isinstance(y, FakeTensor) and len(starts) > 4:
        starts = (*starts[:2], *starts[-2:])
    return [slice(start, start + size) for start in starts]


def _slices(samples: int, size: int) -> list[slice]:
    """Split a batch into slices of a size, at least 1; an empty batch is one slice."""
    size = max(size, 1)
    starts = range(0, max(samples, 1), size)
    return [slice(start, start + size) for start in starts]
