"""How a model is called: by its forward, or by a `__call__` of its class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.overrides import get_testing_overrides

from sffx.arguments import Arguments

# The name that functions of torch give to the tensor that they work on.
_INPUT = "input"


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


def call(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> Any:
    """Return what a model returns for its inputs by name.

    Args:
        model: to call.
        form: of its arguments.
        values: of the inputs.
    """
    args, kwargs = form.fill(values)
    return entry(model)(*args, **kwargs)


def first_by_position(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the tensor that a function of torch works on by position.

    `torch.flip(input=x, dims=(0,))` becomes `torch.flip(x, dims=(0,))`. So the analysis looks for
    the tensor in one place.

    Args:
        function: that is called.
        args: of the call.
        kwargs: of the call.
    """
    if args or _INPUT not in kwargs or not _takes_input_first(function):
        return args, kwargs
    others = {name: value for name, value in kwargs.items() if name != _INPUT}
    return (kwargs[_INPUT],), others


def _takes_input_first(function: Any) -> bool:
    """Return whether the first parameter of a function is `input`, and may be passed by position.

    Compiled functions of torch have no signature, but torch has a stand-in for each that has one.
    """
    stand_in = get_testing_overrides().get(function, function)
    try:
        parameters = inspect.signature(stand_in).parameters.values()
    except (TypeError, ValueError):
        return False
    first = next(iter(parameters), None)
    return first is not None and first.name == _INPUT and first.kind is not first.KEYWORD_ONLY
