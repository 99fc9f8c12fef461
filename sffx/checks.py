"""Checks of one argument of a public function: a flag, a number, something to call.

Each raises an `InputError` that names the argument and its value.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from numbers import Integral, Real
from typing import Any, TypeGuard

from torch import Tensor

from sffx.errors import InputError, shown

# The longest time to wait, in seconds: 31 years.
LONGEST = 10**9


def require_flag(name: str, value: object) -> None:
    """Raise an InputError unless an argument is True or False.

    Anything else would be taken for one of them in silence, as the text "no" for True.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}. Hint: pass True or False")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number; True, False and nan are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, of Python or of numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive_integer(name: str, value: Any, hint: str = "pass a positive integer") -> int:
    """Return an argument that counts something, as an int of Python.

    Args:
        name: of the argument.
        value: of the argument; integers of numpy are integers.
        hint: what to do instead.

    Raises:
        InputError: it is no positive integer.
    """
    if not is_integer(value) or value < 1:
        raise InputError(f"{name} is {shown(value)}. Hint: {hint}")
    return int(value)


def positive_time(name: str, value: Any) -> timedelta:
    """Return an argument that says how long to wait.

    Args:
        name: of the argument.
        value: a timedelta, or a number of seconds.

    Raises:
        InputError: it is no time above 0, or longer than clocks of torch count.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not is_number(seconds) or not 0 < seconds <= LONGEST:
        raise InputError(
            f"{name} is {shown(value)}. Hint: pass a timedelta, or a number of seconds above 0 "
            f"and at most {LONGEST:,}"
        )
    return timedelta(seconds=float(seconds))


def require_callable(name: str, function: object, parameters: Sequence[str]) -> None:
    """Raise an InputError unless an argument can be called with some positional arguments.

    Args:
        name: of the argument.
        function: the argument; of a module, its forward counts.
        parameters: what it is called with, for the hint.
    """
    form = f"({', '.join(parameters)})"
    if not callable(function):
        raise InputError(f"{name} is {shown(function)}. Hint: pass a callable {form}")
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*parameters)
    except TypeError as cause:
        raise InputError(
            f"{name} cannot be called with {form}: {cause}. Hint: it is called with these "
            f"{len(parameters)} in this order"
        ) from cause


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a callable, None where Python does not know it."""
    # `__call__` of a module takes anything, and hands it to `forward`.
    called = getattr(function, "forward", function)
    if isinstance(function, type):
        called = function
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):
        return None


def require_block_names(given: Any, known: Sequence[str]) -> None:
    """Raise an InputError if the argument `blocks` is no list of names that are known.

    Args:
        given: the argument.
        known: the names of the blocks, in order.
    """
    if isinstance(given, str):
        raise InputError(f"blocks is {shown(given)}, not a list. Hint: blocks=[{shown(given)}]")
    # A tensor is a collection as well, and its elements are no names.
    is_list = isinstance(given, Collection) and not isinstance(given, Tensor)
    if not is_list or not all(isinstance(name, str) for name in given):
        raise InputError(
            f"blocks is {shown(given)}, no list of names. Hint: blocks=[{known[-1]!r}]"
        )
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise InputError(
            f"blocks names {', '.join(map(repr, unknown)) or 'no block'}. "
            f"Hint: the blocks are {', '.join(known)}"
        )
