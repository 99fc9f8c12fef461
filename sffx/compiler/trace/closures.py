"""Functions on a model that hold on to parts of the model, and so would not be copied with it.

`old = layer.forward; layer.forward = lambda x: 2 * old(x)` is the case. `copy.deepcopy` copies no
function, so that the layer of a copy would compute with the weights of the original.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn


def closure_over_the_model(model: nn.Module) -> str:
    """Return where a function is set that holds a part of the model, "" where there is none."""
    parts = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for qualname, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN and any(id(held) in parts for held in _held(value)):
                return f"{qualname}.{name}".strip(".")
    return ""


# What every module keeps in these holds modules and tensors, and is copied.
_OWN = ("_modules", "_parameters", "_buffers")


def _held(value: Any) -> Iterator[Any]:
    """Yield what the functions in an attribute hold without a copy."""
    seen: set[int] = set()
    ahead = list(_functions(value))
    while ahead:
        function = ahead.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # the cell of a name that has not been set is empty
                held.append(cell.cell_contents)
        for each in held:
            yield from _members(each)
            ahead += _functions(each)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield the plain functions in an attribute: itself, of a method, of a partial, in a dict."""
    for each in _members(value):
        function = each
        while isinstance(function, (functools.partial, types.MethodType)):
            if isinstance(function, functools.partial):
                function = function.func
            else:
                function = function.__func__
        if isinstance(function, types.FunctionType):
            yield function


def _members(value: Any) -> Iterator[Any]:
    """Yield a value, the module of a bound method, and what a list or a dictionary holds."""
    if isinstance(value, dict):
        for each in value.values():
            yield from _members(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _members(each)
    else:
        yield value
        if isinstance(value, types.MethodType):
            yield value.__self__
