"""How a model is called: by its forward, or by a `__call__` of its class, with named arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def overrides_call(kind: type[nn.Module]) -> bool:
    """Whether a class of modules has a `__call__` of its own."""
    return kind.__call__ is not nn.Module.__call__


def entry(model: nn.Module) -> Callable[..., Any]:
    """Return what a call of the model runs, without the hooks of the model itself.

    It is the forward, which an instance may have of its own; or the `__call__` of the class.
    """
    if overrides_call(type(model)):
        return functools.partial(type(model).__call__, model)
    forward: Callable[..., Any] = model.forward
    return forward


def signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a call of the model."""
    found = inspect.signature(entry(model))
    kinds = {parameter.kind for parameter in found.parameters.values()}
    # A `__call__(*args, **kwargs)` hands on what it gets.
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return inspect.signature(model.forward)
    return found


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return bound arguments by name, those that `*args` and `**kwargs` collect as well.

    Of `*x`, with several values, they are called x_0, x_1 and so on; a single one is called x.
    """
    named: dict[str, Any] = {}
    collected: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            collected = value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            names = [name] if len(value) == 1 else [f"{name}_{i}" for i in range(len(value))]
            named.update(zip(names, value, strict=True))
        else:
            named[name] = value
    return {**named, **collected}


def call(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Return what a model returns for arguments by name, as `by_name` has them."""
    parameters = signature(model).parameters
    keyword = dict(arguments)
    positional: list[Any] = []
    if any(parameter.kind in _UNNAMED for parameter in parameters.values()):
        for name, parameter in parameters.items():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                unnamed = [each for each in keyword if each not in parameters or each == name]
                positional += [keyword.pop(each) for each in unnamed if each.startswith(name)]
            elif name not in keyword:
                break
            elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                positional.append(keyword.pop(name))
    return entry(model)(*positional, **keyword)


_UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
