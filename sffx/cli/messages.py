"""The frame of a command: progress and errors on stderr. Nothing here imports torch."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sffx.cli.wording import in_options
from sffx.errors import SffxError
from sffx.progress import LOGGER

# As a shell has it for a process that SIGINT ended.
INTERRUPTED = 130


def exit_code(command: str, work: Callable[[], None]) -> int:
    """Do the work of a command, and return its exit code.

    Args:
        command: its name.
        work: shows its progress, and may raise an SffxError.

    Returns:
        0; 2 when something was wrong, and 130 when Ctrl-C ended it, which stderr tells; 1 when
        nobody reads what it prints.
    """
    try:
        with showing_progress(), printing_anything():
            work()
            # What is printed may still wait here, and a closed pipe is found as late as now.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{command}: interrupted; nothing was written in part", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    except SffxError as error:
        print(f"{command}: {in_options(str(error))}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def printing_anything() -> Iterator[None]:
    """Print "?" for a character that the encoding of stdout does not have; else it is an error.

    Tables have an ellipsis, and models names of any kind. Not every terminal has UTF-8.
    """
    out = sys.stdout
    # A notebook's stdout is none of a file.
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    errors = out.errors
    out.reconfigure(errors="replace")
    try:
        yield
    finally:
        out.reconfigure(errors=errors)


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
