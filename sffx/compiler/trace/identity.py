"""Comparisons by `is` of what a trace knows as a proxy: Python asks nobody, and so they are lost.

`self.training is True` and `x.dtype is torch.float32` are false of a proxy. By `==` they can be
traced.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from sffx.compiler.trace.state import names_in

# A trace looks into none of their functions, and their errors are not the model's.
FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sffx"})
# Folders of installed libraries.
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def require_no_identity(module: nn.Module) -> None:
    """Raise a RuntimeError if the forward of a module compares by `is` what will be a proxy."""
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    if not isinstance(forward, FunctionType):
        return
    for function in reached(forward, type(module)):
        what = _compared(function.__code__)
        if what:
            raise RuntimeError(
                f"{function.__qualname__} compares {what} by 'is', which a graph cannot hold; "
                "'==' can be traced"
            )


def reached(function: FunctionType, kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield a function, and the methods and functions that it names, by way of others as well.

    They may be of other files, but not of installed libraries, unless it is of that file itself.
    """
    ahead = [function]
    seen: dict[FunctionType, None] = {}
    while ahead:
        each = ahead.pop()
        is_of_file = each.__globals__ is function.__globals__
        if each in seen or not (is_of_file or _is_own(each.__globals__)):
            continue
        seen[each] = None
        ahead += _named(each, kind)
    yield from seen


def _named(function: FunctionType, kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield the functions that a function names: methods, of its file, or of another file."""
    files: list[ModuleType] = []
    for name in names_in(function.__code__):
        # `helpers.scaled` names the file first, and then what is in it.
        values = [getattr(kind, name, None), function.__globals__.get(name)]
        values += [vars(file).get(name) for file in files]
        for value in values:
            if isinstance(value, FunctionType):
                inner = inspect.unwrap(value)
                yield inner if isinstance(inner, FunctionType) else value
            elif isinstance(value, ModuleType) and _is_own(vars(value)):
                files.append(value)


def _is_own(namespace: Mapping[str, Any]) -> bool:
    """Whether a file is the user's own: none of an installed library."""
    package = str(namespace.get("__name__", "")).partition(".")[0]
    places = Path(str(namespace.get("__file__", ""))).parts
    return package not in FOREIGN and _INSTALLED.isdisjoint(places)


@functools.lru_cache(maxsize=1000)
def _compared(code: CodeType) -> str:
    """Return what the code of a function compares by `is`, "" for nothing that is a proxy."""
    steps = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    for left, right, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname != "IS_OP":
            continue
        if isinstance(getattr(torch, str(right.argval), None), torch.dtype):
            return f"with torch.{right.argval}"
        if type(right.argval) is bool and left.opname == "COMPARE_OP":
            return f"a comparison with {right.argval}"
        if type(right.argval) is bool and left.argval == "training":
            return f"training with {right.argval}"
    return ""
