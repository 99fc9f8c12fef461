"""Comparisons by `is` that a trace would get wrong: `self.training is True`, or of a dtype.

A proxy stands for the training flag or the dtype in a trace. An object has no say in `is`, so the
comparison would be false without a word. A proxy does answer `==`.
"""

from __future__ import annotations

import dis
import functools
import inspect
from types import CodeType, FunctionType

import torch
from torch import nn

from sffx.compiler.trace.code_names import functions_reached


def require_no_identity(module: nn.Module) -> None:
    """Raise a RuntimeError if the forward of a module compares by `is` what a trace makes a proxy.

    The functions and methods that it reaches count as well.
    """
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    if not isinstance(forward, FunctionType):
        return
    for function in functions_reached([forward], type(module)):
        what = _compared_by_is(function.__code__)
        if what:
            raise RuntimeError(
                f"{function.__qualname__} compares {what} by 'is', which a graph cannot hold; "
                "'==' can be traced"
            )


@functools.lru_cache(maxsize=1000)
def _compared_by_is(code: CodeType) -> str:
    """Return which proxy the code of a function compares by `is`, in words; "" where none."""
    steps = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    for left, right, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname != "IS_OP":
            continue
        value = right.argval
        if isinstance(getattr(torch, str(value), None), torch.dtype):
            return f"a dtype with torch.{value}"
        if value is not None and "dtype" in _attributes(left, right):
            return "a dtype"
        if type(value) is bool and left.opname == "COMPARE_OP":
            return f"a comparison with {value}"
        if type(value) is bool and left.argval == "training":
            return f"training with {value}"
    return ""


def _attributes(*steps: dis.Instruction) -> list[str]:
    return [step.argval for step in steps if step.opname == "LOAD_ATTR"]
