"""Functions on a model that hold on to parts of the model, and so would not be copied with it.

`old = layer.forward; layer.forward = lambda x: 2 * old(x)` is the case. `copy.deepcopy` copies no
function, so that the layer of a copy would compute with the weights of the original. In a script
`old` is a global, in a function it is a free variable.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from sffx.compiler.trace.code_names import (
    forward_of,
    functions_reached,
    is_own,
    names_in,
    values_named,
)


def closure_over_the_model(model: nn.Module) -> str:
    """Return where a function is set that holds a part of the model, "" where there is none."""
    parts = _parts(model)
    for qualname, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN and any(id(held) in parts for held in _held(value)):
                return f"{qualname}.{name}".strip(".")
    return ""


def global_of_the_model(model: nn.Module) -> tuple[str, str]:
    """Return which forward names a part of the model as a global, and that name; or "" and "".

    `def forward(self, x): return net.layer(x)` is the case, where `self.layer` is meant.
    """
    parts = _parts(model)
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        for function in functions_reached(forward_of(kind), kind):
            for name, value in _named_by(function):
                if any(id(held) in parts for held in _members(value)):
                    return f"{kind.__name__}.{function.__name__}", name
    return "", ""


def _parts(model: nn.Module) -> set[int]:
    """Return the identities of the parts of a model that a copy must have for itself."""
    parts = {id(part) for part in (*model.parameters(), *model.buffers())}
    return parts.union(id(module) for module in model.modules() if not _is_function(module))


def _is_function(module: nn.Module) -> bool:
    """Return whether a module has no state, as an activation: one will do for all copies."""
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    return not any(_reads_mode(part) for part in module.modules())


def _reads_mode(module: nn.Module) -> bool:
    return any("training" in names_in(each.__code__) for each in forward_of(type(module)))


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
        held += [each for _, each in _named_by(function)]
        for each in held:
            yield from _members(each)
            ahead += _functions(each)


def _named_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function names, with the names; of a library's function no globals."""
    free = function.__code__.co_freevars
    for name, value in values_named(function):
        if name in free or is_own(function.__globals__):
            yield name, value


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
    ahead, seen = [value], set[int]()
    while ahead:
        each = ahead.pop()
        if id(each) in seen:  # a dictionary may hold itself
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            ahead += each.values()
        elif isinstance(each, (list, tuple)):
            ahead += each
        else:
            yield each
            if isinstance(each, types.MethodType):
                yield each.__self__
