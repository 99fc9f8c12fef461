"""Functions of one decorator, as a package makes them, which read sizes as plain numbers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor


def by_sizes(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(*tensors: Any) -> Tensor:
        sizes = [tuple(operator.index(size) for size in each.shape) for each in tensors]
        return function(*tensors, sizes=sizes)

    return inner


@by_sizes
def shifted(x: Tensor, y: Tensor, sizes: Any) -> Tensor:
    return x + y.expand(sizes[0])


@by_sizes
def scaled(x: Tensor, y: Tensor, sizes: Any) -> Tensor:
    return x * y.expand(sizes[0])
