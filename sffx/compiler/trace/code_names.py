"""What the code of a function names, and the functions that it reaches by these names."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any

from sffx.errors import is_installed

# A trace looks into none of their functions, and their errors are not the model's.
FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sffx"})


def package_of(namespace: Mapping[str, Any]) -> str:
    """Return the package that a file belongs to, given its names."""
    return str(namespace.get("__name__", "")).partition(".")[0]


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names in the code of a function, and in that of the functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def globals_in(code: CodeType) -> Iterator[str]:
    """Yield the globals, the builtins and the modules that the code of a function names.

    Names of attributes, as `input` in `self.input`, are not among them.
    """
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"):
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from globals_in(constant)


@functools.lru_cache(maxsize=4096)  # to take code apart is slow, and each trace asks several times
def _globals_of(code: CodeType) -> frozenset[str]:
    return frozenset(globals_in(code))


def forward_of(kind: type) -> list[FunctionType]:
    """Return the forward of a class without its decorators, in a list that may be empty."""
    return list(_plain(inspect.getattr_static(kind, "forward", None)))


def functions_reached(functions: Iterable[FunctionType], kind: type) -> Iterator[FunctionType]:
    """Yield functions, and the methods and functions that they reach, directly or through others.

    Args:
        functions: where the search begins. It stays out of installed libraries, except of the file
            of each of these.
        kind: a class, whose methods are reached by their names.
    """
    ahead = [(each, each.__globals__) for each in functions]
    seen: set[FunctionType] = set()
    while ahead:
        function, file = ahead.pop()
        if function in seen or not (function.__globals__ is file or is_own(function.__globals__)):
            continue
        seen.add(function)
        yield function
        for name in names_in(function.__code__):
            ahead += [(each, file) for each in _plain(getattr(kind, name, None))]
        for _, value in values_named(function):
            ahead += [(each, file) for each in _plain(value)]


def values_named(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals and the free variables that a function names, with their names.

    The globals may be those of its file or of the user's other files.
    """
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # the cell of a name that has not been set is empty
            yield name, cell.cell_contents
    files: list[ModuleType] = []
    in_file = _globals_of(function.__code__)
    for name in names_in(function.__code__):
        # `helpers.scaled` names the file first, and then what is in it. `self.main` is no global.
        namespaces = [function.__globals__] if name in in_file else []
        for namespace in (*namespaces, *map(vars, files)):
            value = namespace.get(name)
            if isinstance(value, ModuleType) and is_own(vars(value)):
                files.append(value)
            elif value is not None:
                yield name, value


def _plain(value: Any) -> Iterator[FunctionType]:
    """Yield a function without its decorators, where a value is one."""
    if isinstance(value, FunctionType):
        inner = inspect.unwrap(value)
        yield inner if isinstance(inner, FunctionType) else value


def is_own(namespace: Mapping[str, Any]) -> bool:
    """Whether a file, given its names, is the user's own and not an installed library's."""
    file = str(namespace.get("__file__", ""))
    return package_of(namespace) not in FOREIGN and not is_installed(file)
