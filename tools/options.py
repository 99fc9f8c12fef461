"""Options of commands that are checked before hours of work."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number of an option, for `type=` of argparse.

    Args:
        least: the smallest number that is taken.
    """

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"it takes whole numbers from {least} on, not {text}")
        return value

    return read
