"""What the code of a function names, and the functions that it reaches by these names."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

# A trace looks into none of their functions, and their errors are not the model's.
FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sffx"})
# Folders of installed libraries.
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def package_of(namespace: Mapping[str, Any]) -> str:
    """Return the package that a file belongs to, given its names."""
    return str(namespace.get("__name__", "")).partition(".")[0]


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names in the code of a function, and in that of the functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def functions_reached(function: FunctionType, kind: type) -> Iterator[FunctionType]:
    """Yield a function, and the methods and functions that it reaches, directly or through others.

    Args:
        function: where the search begins. It stays out of installed libraries, except of the
            function's own file.
        kind: a class, whose methods are reached by their names.
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


def _named(function: FunctionType, kind: type) -> Iterator[FunctionType]:
    """Yield the methods, and the functions of its file or of another one, that a function names."""
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
    """Whether a file, given its names, is the user's own and not an installed library's."""
    places = Path(str(namespace.get("__file__", ""))).parts
    return package_of(namespace) not in FOREIGN and _INSTALLED.isdisjoint(places)
