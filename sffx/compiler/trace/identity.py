"""Comparisons by `is` of what a trace knows as a proxy: Python asks nobody, and so they are lost.

`self.training is True` and `x.dtype is torch.float32` are false of a proxy. By `==` they can be
traced.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

import torch
from torch import nn

from sffx.compiler.trace.state import names_in


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
    """Yield a function, and the methods and the functions of its file that it names."""
    ahead = [function]
    seen: dict[FunctionType, None] = {}
    while ahead:
        each = ahead.pop()
        if each in seen or each.__globals__ is not function.__globals__:
            continue
        seen[each] = None
        for name in names_in(each.__code__):
            for value in (getattr(kind, name, None), each.__globals__.get(name)):
                if isinstance(value, FunctionType):
                    ahead.append(value)
    yield from seen


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
