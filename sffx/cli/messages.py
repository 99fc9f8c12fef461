"""Show on stderr how far long work is. Nothing here imports torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sffx.progress import LOGGER


@contextmanager
def showing_progress() -> Iterator[None]:
    """Print the messages of the logger "sffx" on stderr; afterwards it is as before."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sffx: %(message)s"))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
