"""The generators of random numbers that a forward may draw from: Python's, NumPy's and torch's."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave the generators as they were."""
    python_state = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def call_without_draws(call: Callable[[], Any]) -> Any:
    """Return what `call` returns, and refuse code that draws random numbers by itself.

    A traced operation may draw, since it draws again whenever the graph runs. A random number that
    other code draws would be frozen into the graph.

    Raises:
        RuntimeError: a generator has moved.
    """
    before = _states()
    value = call()
    if before != _states():
        raise RuntimeError(_DRAWS)
    return value


def _states() -> tuple[Any, ...]:
    # As bytes, since tensors and arrays compare element by element.
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        pickle.dumps(np.random.get_state(legacy=False)),
    )


class Drawn(float):
    """Stands, during a trace, for a number that Python's `random.random()` has drawn.

    It lies in [0, 1), so that some comparisons have one outcome: a layer that is dropped with
    probability 0 is never dropped.
    """

    # So a number of NumPy leaves the comparison to this class, in any order.
    __array_ufunc__ = None

    def __lt__(self, other: float) -> bool:
        return self._settled(other >= 1, other <= 0)

    def __ge__(self, other: float) -> bool:
        return not self < other

    def __le__(self, other: float) -> bool:
        return self._settled(other >= 1, other < 0)

    def __gt__(self, other: float) -> bool:
        return not self <= other

    @staticmethod
    def _settled(is_always: bool, is_never: bool) -> bool:
        if is_always or is_never:
            return bool(is_always)
        raise RuntimeError(_DRAWS)

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(_DRAWS)

    __eq__ = __ne__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __neg__ = __pow__ = __rpow__ = __int__ = __round__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __bool__ = __float__ = _refuse
    __floor__ = __ceil__ = __trunc__ = __hash__ = __abs__ = _refuse


_DRAWS = (
    "it draws random numbers that do not depend on its input, which a graph would freeze "
    "(or another thread drew some)"
)
