"""Interrupts at chosen lines, as Ctrl-C may come at any."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import FrameType, ModuleType
from typing import Any


def lines_run(module: ModuleType, call: Callable[[], object], functions: Collection[str]) -> int:
    """Return how many lines of some functions of a module a call runs."""
    return _run(module, call, functions, stop=None)


def interrupt(
    module: ModuleType, call: Callable[[], object], functions: Collection[str], line: int
) -> None:
    """Run a call, and raise KeyboardInterrupt before it runs a line of these functions.

    Args:
        module: that holds the functions.
        call: to run.
        functions: names of functions; all of the module's where empty.
        line: the number of the line in the order in which lines run, from 0.
    """
    try:
        _run(module, call, functions, stop=line)
    except KeyboardInterrupt:
        return
    raise AssertionError(f"the call runs fewer than {line + 1} lines")


def _run(
    module: ModuleType, call: Callable[[], object], functions: Collection[str], stop: int | None
) -> int:
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != module.__file__:
            return None
        if functions and frame.f_code.co_name not in functions:
            return None
        if event == "line":
            seen += 1
            if seen - 1 == stop:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen
