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
        raise RuntimeError(
            "it draws random numbers that do not depend on its input, which a graph would freeze "
            "(or another thread drew some)"
        )
    return value


def _states() -> tuple[Any, ...]:
    # As bytes, since tensors and arrays compare element by element.
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        pickle.dumps(np.random.get_state(legacy=False)),
    )
