"""Checks of the options of an objective."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sffx.checks import is_integer, is_number
from sffx.errors import InputError, shown


def require_choice(option: str, value: Any, known: Iterable[str]) -> None:
    """Raise an InputError if an option is none of the names that it may have."""
    # An array would compare each of its elements.
    if not isinstance(value, str) or value not in known:
        names = ", ".join(map(repr, known))
        raise InputError(f"{option} is {shown(value)}. Hint: choose one of {names}")


def require_positive(option: str, value: Any) -> None:
    """Raise an InputError if an option is no finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise InputError(f"{option} is {shown(value)}. Hint: pass a positive number")


def require_not_negative(option: str, value: Any) -> None:
    """Raise an InputError if an option is no finite number, or one below 0."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise InputError(f"{option} is {shown(value)}. Hint: pass a number, 0 or more")


def require_natural(option: str, value: Any) -> None:
    """Raise an InputError if an option is no integer, or one below 0."""
    if not is_integer(value) or value < 0:
        raise InputError(f"{option} is {shown(value)}. Hint: pass an integer, 0 or more")
