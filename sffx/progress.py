"""Work that takes long says how far it is, by the logger "sffx" at level INFO.

The commands show these messages. In a program of one's own, this shows them:

    logging.basicConfig(level=logging.INFO)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

LOGGER = logging.getLogger("sffx")
SECONDS = 5.0  # between two messages, and before the first

T = TypeVar("T")


class Progress:
    """Counts what is done, and says so every few seconds.

    Args:
        what: is done, such as "blocks counted".
        total: how many there are, None where that is unknown.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self._start = time.monotonic()
        self._told = self._start

    def advance(self, count: int = 1) -> None:
        """Note that so many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self._told < SECONDS:
            return
        self._told = now
        of_all = "" if self.total is None else f" of {self.total}"
        LOGGER.info("%s: %d%s in %.0f s", self.what, self.done, of_all, now - self._start)


def reported(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield some items, and say every few seconds how many are done.

    Args:
        items: to yield.
        what: they are, such as "batches".
        total: how many there are, None where that is unknown.
    """
    progress = Progress(what, total)
    for item in items:
        yield item
        progress.advance()


def length_of(items: Any) -> int | None:
    """Return the number of items, None where it is unknown, as that of a generator."""
    try:
        return len(items)
    except (TypeError, NotImplementedError):
        return None
