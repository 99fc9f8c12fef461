"""Work that takes long says how far it is, by the logger "sffx" at level INFO.

The commands show these messages. In a program of one's own, this shows them:

    logging.basicConfig(level=logging.INFO)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

LOGGER = logging.getLogger("sffx")
SECONDS = 5.0  # between two messages, and before the first

T = TypeVar("T")

# When the last message was logged, by time.monotonic(). Work inside other work speaks for both.
_last_message = 0.0


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
        _say(f"{self.what}: {self.done}{of_all} in {now - self._start:.0f} s")


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


@contextmanager
def running(what: str) -> Iterator[None]:
    """Say every few seconds that one piece of work still runs; also usable as a decorator.

    It stays silent while work inside it says how far it is.

    Args:
        what: runs, such as "exporting to ONNX".
    """
    ended = threading.Event()
    # A thread, because the work is one call that never comes back to say how far it is.
    watcher = threading.Thread(target=_watch, args=(what, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def _watch(what: str, ended: threading.Event) -> None:
    """Log what runs as long as it has not ended."""
    start = time.monotonic()
    while not ended.wait(SECONDS):
        now = time.monotonic()
        if now - _last_message >= SECONDS:
            _say(f"{what}: {now - start:.0f} s so far")


def _say(message: str) -> None:
    global _last_message
    _last_message = time.monotonic()
    LOGGER.info(message)


def length_of(items: Any) -> int | None:
    """Return the number of items, None where it is unknown, as that of a generator."""
    try:
        return len(items)
    except (TypeError, NotImplementedError):
        return None
