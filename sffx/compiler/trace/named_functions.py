"""Functions that the files of models name: those that keep their results, and a bound `apply`.

A stand-in takes the place of each while a trace runs. All loaded modules are looked at, which may
be thousands.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Size, nn
from torch.autograd import Function

from sffx.compiler.caches import CACHED
from sffx.compiler.trace.proxy import KindOf, ShapeOf, has_proxy
from sffx.errors import is_installed

# Packages whose functions are given no proxy by a forward, or know what to do with one.
_WITHOUT_PROXIES = {*sys.stdlib_module_names, "torch", "torchgen", "numpy", "sympy", "cuda", "sffx"}

# What was found in installed modules, by the `id` of their namespace: the module's name, how many
# names it held, and the names of such functions. Files of the user are not among them, since a
# notebook may add functions.
_NAMES_OF_FUNCTIONS: dict[int, tuple[str, int, tuple[str, ...]]] = {}

# All modules at the last trace, and those of them that `_files_of_models` returned.
_modules: list[ModuleType] = []
_files: list[ModuleType] = []

# The class of a method of C++ code that is bound.
_BOUND = type(Function.apply)


def caches() -> Iterator[tuple[Any, str, Any]]:
    """Yield the functions of modules that keep their results, each with one that keeps no proxy.

    A proxy that is kept would be given to a later trace, whose graph does not have its node.
    """
    for module, name, value in _functions_in_files():
        if type(value) is CACHED and _takes_arguments(value):
            yield module, name, _keeping_no_proxy(value)


def _functions_in_files() -> Iterator[tuple[ModuleType, str, Any]]:
    """Yield the functions in files of models that are to be replaced, with their names there."""
    for module in _files_of_models():
        names = vars(module)
        for name in _names_of_functions(module, names):
            yield module, name, names.get(name)


def _applied(value: Any) -> type[Function] | None:
    """Return the class of an autograd function whose `apply` this is, None of anything else."""
    if type(value) is not _BOUND or value.__name__ != "apply":
        return None
    kind = value.__self__
    return kind if isinstance(kind, type) and issubclass(kind, Function) else None


def bound_in_files() -> Iterator[tuple[Any, str, type[Function]]]:
    """Yield the files of models that name a bound `apply`."""
    for module, name, value in _functions_in_files():
        kind = _applied(value)
        if kind is not None:
            yield module, name, kind


def bound_in_model(probe: nn.Module) -> Iterator[tuple[Any, str, type[Function]]]:
    """Yield the modules and classes that name a bound `apply`, as in `self.spike = Spike.apply`."""
    owners: dict[int, Any] = {}
    for module in probe.modules():
        for owner in (module, *type(module).__mro__):
            owners[id(owner)] = owner
    for owner in owners.values():
        for name, value in list(vars(owner).items()):
            kind = _applied(value)
            if kind is not None:
                yield owner, name, kind


def _names_of_functions(module: ModuleType, names: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a module's functions that keep their results, and of a bound `apply`.

    A program may have imported thousands of modules, so a known one is not searched again.
    """
    own = getattr(module, "__name__", "")
    known = _NAMES_OF_FUNCTIONS.get(id(names))
    if known is not None and known[0] == own and known[1] == len(names):
        return known[2]
    found = tuple(
        name
        for name, value in list(names.items())
        if type(value) is CACHED or _applied(value) is not None
    )
    if is_installed(getattr(module, "__file__", None) or ""):
        _NAMES_OF_FUNCTIONS[id(names)] = (own, len(names), found)
    return found


def _takes_arguments(cached: Any) -> bool:
    """Return whether a proxy can be given to a function at all."""
    code = getattr(cached.__wrapped__, "__code__", None)
    if code is None:
        return True
    takes_any_number = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return bool(code.co_argcount or code.co_kwonlyargcount or takes_any_number)


@contextmanager
def kinds_of_proxies() -> Iterator[None]:
    """Let `type(x)` say of a proxy what it says of the value, in the files of all models.

    Likewise `Size` takes proxies, in the files where this name is torch's. There may be thousands
    of files. One loop over them is faster than a `replaced` for each.
    """
    modules: list[Any] = []
    with_size: list[Any] = []
    try:
        for module in _files_of_models():
            # Not where it has its own `type`. A module may also be listed under two names.
            if "type" not in vars(module):
                modules.append(module)
                setattr(module, "type", KindOf)  # noqa: B010 - mypy knows no such attribute
            if vars(module).get("Size") is Size:
                with_size.append(module)
                setattr(module, "Size", ShapeOf)  # noqa: B010
        yield
    finally:
        for module in modules:
            del module.type
        for module in with_size:
            module.Size = Size


def _files_of_models() -> list[ModuleType]:
    """Return the modules, as Python has them, whose functions may be given a proxy.

    There may be thousands. Unless one has come or gone since the last trace, they are the same.
    """
    global _modules, _files
    modules = list(sys.modules.values())
    if len(modules) != len(_modules) or not all(map(operator.is_, modules, _modules)):
        _files = [module for module in modules if _package_of(module) not in _WITHOUT_PROXIES]
        _modules = modules
    return _files


def _package_of(module: ModuleType) -> str:
    return getattr(module, "__name__", "").partition(".")[0]


def _keeping_no_proxy(cached: Any) -> Callable[..., Any]:
    @functools.wraps(cached)
    def function(*args: Any, **kwargs: Any) -> Any:
        if has_proxy(args, kwargs):
            return cached.__wrapped__(*args, **kwargs)
        return cached(*args, **kwargs)

    return function
