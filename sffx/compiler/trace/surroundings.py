"""What a forward reads of its surroundings: the clock, the environment, files.

Such a value is no part of the model's input. A graph holds what the forward read during the trace.
"""

from __future__ import annotations

import builtins
import datetime
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from sffx.compiler.trace.code_names import (
    FOREIGN,
    forward_of,
    functions_reached,
    globals_in,
    names_in,
)

# The names that read such values, by the module or the class that has them.
_READERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        time,
        (
            *("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns"),
            *("process_time", "thread_time", "localtime", "gmtime", "strftime", "ctime"),
        ),
    ),
    (datetime.datetime, ("now", "utcnow", "today")),
    (datetime.date, ("today",)),
    (os, ("environ", "getenv", "urandom", "getpid", "listdir", "cpu_count")),
    (uuid, ("uuid1", "uuid4")),
    (pathlib.Path, ("read_text", "read_bytes")),
    (builtins, ("open", "input")),
)


def readers_of_surroundings(modules: Iterable[nn.Module]) -> list[str]:
    """Return the names by which the forwards of modules, and functions there, read such values."""
    found: dict[str, None] = {}
    for kind in {type(module): None for module in modules}:
        if kind.__module__.partition(".")[0] in FOREIGN:
            continue
        for function in functions_reached(forward_of(kind), kind):
            found.update(dict.fromkeys(_readers_in(function)))
    return list(found)


def _readers_in(function: FunctionType) -> Iterator[str]:
    names = set(names_in(function.__code__))
    for name in dict.fromkeys(globals_in(function.__code__)):
        value = _value_of(name, function)
        for owner, readers in _READERS:
            title = owner.__name__
            if value is owner or _holds(value, owner):
                yield from (f"{title}.{reader}" for reader in readers if reader in names)
            elif name in readers and value is not None and value is getattr(owner, name, None):
                yield name if owner is builtins else f"{title}.{name}"


def _value_of(name: str, function: FunctionType) -> Any:
    """Return what a global name stands for in a function, None where it is not known."""
    if name in function.__globals__:
        return function.__globals__[name]
    if name in sys.stdlib_module_names:  # imported in the function
        return sys.modules.get(name)
    return getattr(builtins, name, None)


def _holds(value: Any, owner: Any) -> bool:
    """Return whether a value is the file of a class, as `datetime` in `datetime.datetime.now`."""
    is_file = isinstance(value, ModuleType) and value is not builtins
    return is_file and isinstance(owner, type) and getattr(value, owner.__name__, None) is owner
