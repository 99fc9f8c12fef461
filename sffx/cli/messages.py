"""The frame of a command: progress and errors on stderr. Nothing here imports torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sffx.cli.wording import in_options
from sffx.errors import SffxError
from sffx.progress import LOGGER


def exit_code(command: str, work: Callable[[], None]) -> int:
    """Do the work of a command, and return its exit code.

    Args:
        command: its name.
        work: shows its progress, and may raise an SffxError.

    Returns:
        0, or 2 when something was wrong, which stderr tells.
    """
    try:
        with showing_progress():
            work()
    except SffxError as error:
        print(f"{command}: {in_options(str(error))}", file=sys.stderr)
        return 2
    return 0


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
