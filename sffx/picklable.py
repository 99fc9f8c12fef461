"""What pickle cannot hold: functions and classes that are made inside functions, and lambdas.

Pickle writes the name under which a function can be imported. Such a function has none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.errors import InputError, first_line

# Classes without a name that pickle writes all the same.
_KNOWN_TO_PICKLE = (type(None), type(...), type(NotImplemented))


def import_name(value: Any) -> str:
    """Return "module.qualname" of a function or a class; of any other object, that of its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def require_picklable(module: nn.Module) -> None:
    """Raise an InputError if a module holds something that has no name to import it by."""
    for qualname, part in _modules(module):
        place = f"the module {qualname!r}" if qualname else f"the model {type(part).__name__}"
        # fx makes a class for each graph, and pickles it in its own way.
        is_graph = isinstance(part, fx.GraphModule)
        is_script = isinstance(part, torch.jit.ScriptModule)
        if is_script or (not is_graph and _pickles_itself(type(part))):
            _require_own_way(part, place)
            continue
        if not is_graph and not _has_name(type(part)):
            raise InputError(_message(f"{place} is of the class", type(part)))
        _require_attributes(part, place)


def require_picklable_options(value: Any, place: str) -> None:
    """Raise an InputError if an object's class or attributes have no name to import them by.

    Args:
        value: an object that is no module.
        place: what it is, for the message: "the objective 'mine'".
    """
    if not _has_name(type(value)):
        raise InputError(_message(f"{place} is of the class", type(value)))
    _require_attributes(value, place)


def _require_attributes(owner: Any, place: str) -> None:
    """Raise an InputError if an attribute of an object holds something that has no name."""
    for name, value in vars(owner).items():
        nameless = next(_nameless(value, set()), None)
        if nameless is not None:
            raise InputError(_message(f"the attribute {name!r} of {place} holds", nameless))


def _require_own_way(part: nn.Module, place: str) -> None:
    """Raise an InputError if a module with its own way of being pickled refuses to be.

    Parametrized modules and scripts do.
    """
    reason = _refusal(part)
    if reason:
        raise InputError(
            f"the net cannot be pickled, because of {place}: {reason}. Hint: {_OTHERWISE}"
        )


def _refusal(part: nn.Module) -> str:
    """Return why a module refuses to be pickled, "" where it does not."""
    if isinstance(part, torch.jit.ScriptModule):
        return "it is a script, which torch.jit.save writes"
    state: Any = getattr(part, "__getstate__", None)  # not every object of Python 3.10 has it
    try:
        if state is not None:
            state()
    except Exception as error:
        return first_line(error)
    return ""


# What to do with a net that pickle does not take.
_OTHERWISE = "keep the weights alone by sffx.save_checkpoint, and cut the model again"


def _message(what: str, nameless: Any) -> str:
    if isinstance(nameless, MethodType):
        return (
            f"the net cannot be pickled: {what} {nameless.__qualname__} as a method of a "
            f"{type(nameless.__self__).__name__}, whose class does not have it. Hint: make it a "
            f"method of a class of your own, or {_OTHERWISE}"
        )
    kind = "class" if isinstance(nameless, type) else "function"
    return (
        f"the net cannot be pickled: {what} {nameless.__qualname__}, and pickle holds only what "
        f"can be imported by its name. Hint: define the {kind} at the top of a file, or "
        f"{_OTHERWISE}"
    )


def _modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a net, and those of the model that it was cut from, by their names."""
    for qualname, part in module.named_modules():
        yield qualname, part
        origin = vars(part).get("origin")
        if isinstance(getattr(origin, "model", None), nn.Module):
            yield from origin.model.named_modules()


def _pickles_itself(kind: type) -> bool:
    """Whether a class of modules has its own way of being pickled, which may leave things out."""
    names = ("__getstate__", "__reduce__", "__reduce_ex__")
    return any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def _nameless(value: Any, passed: set[int]) -> Iterator[Any]:
    """Yield the functions, classes and methods in a value that pickle cannot find by a name.

    A container is looked through.
    """
    if id(value) in passed or isinstance(value, (Tensor, nn.Module, str)):
        return
    # A container may hold itself.
    passed.add(id(value))
    if isinstance(value, (FunctionType, type)):
        if value not in _KNOWN_TO_PICKLE and not _has_name(value):
            yield value
        return
    if isinstance(value, MethodType):
        # Pickle writes the object and the name of the method, and looks for it when it loads.
        method = getattr(type(value.__self__), value.__name__, None)
        if method is not value.__func__ and not isinstance(value.__self__, type):
            yield value
    for part in _parts(value):
        yield from _nameless(part, passed)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value


def _has_name(value: Any) -> bool:
    """Whether a function or a class can be imported by its name."""
    # "Net.Block" is looked for in the module, and then in what was found.
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value
