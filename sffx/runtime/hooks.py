"""Keep hooks of parameters from running while gradients are computed that are handed over, or stepped on, later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept_back(hooks: Iterable[dict[int, Any] | None]) -> Iterator[None]:
    """Empty what parameters hold their hooks in, None where they have none, for the time of the context."""
    held = [(each, dict(each)) for each in hooks if each]
    for each, _ in held:
        each.clear()
    try:
        yield
    finally:
        for each, kept in held:
            each.update(kept)
