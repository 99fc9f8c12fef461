"""The code of a function that a forward makes, such as a lambda; it can be pickled.

Pickle holds functions by the name by which they are imported. A function that is made inside
another one has no such name. But its code is a constant of the code around it. So it is held by the
name of the outermost function, and the way from there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from sffx.errors import InputError


class LocalCode:
    """Makes a function anew from its code.

    Args:
        function: whose code it is. What the function holds is not kept.
    """

    def __init__(self, function: FunctionType) -> None:
        self._set(function.__code__, function.__globals__, function.__name__)

    def _set(self, code: CodeType, namespace: dict[str, Any], name: str) -> None:
        self.code = code
        self.namespace = namespace
        self.name = name

    def __call__(self, contents: list[Any], defaults: Any, owner: Any) -> FunctionType | MethodType:
        """Return the function, as a method where there is an owner.

        Args:
            contents: of its closure, in order.
            defaults: of its arguments, and of those that are passed by name alone.
            owner: its first argument, or None.
        """
        cells = tuple(map(CellType, contents))
        made = FunctionType(self.code, self.namespace, self.name, defaults[0], cells)
        made.__kwdefaults__ = defaults[1]
        return made if owner is None else MethodType(made, owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalCode:
        # Nothing in it changes, and a copy would copy all that the file of the function holds.
        return self

    def __reduce__(self) -> Any:
        module = str(self.namespace.get("__name__"))
        for path, function in _functions(self.namespace):
            way = _way(function.__code__, self.code)
            if way is not None:
                return _found, (module, path, way, self.name)
        raise InputError(
            f"the net cannot be pickled: the function {self.name}, which the forward "
            f"maps, is not found in {module}. Hint: define it at the top of a file, or keep the "
            "weights alone by sffx.save_checkpoint, and cut the model again"
        )


def _functions(namespace: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], FunctionType]]:
    """Yield the functions and methods of a file, each with the names that lead to it."""
    own = namespace.get("__name__")
    for name, value in list(namespace.items()):
        if getattr(value, "__module__", None) != own:
            continue
        if isinstance(value, FunctionType):
            yield (name,), value
        elif isinstance(value, type):
            for attribute, method in vars(value).items():
                if isinstance(method, FunctionType):
                    yield (name, attribute), method


def _way(around: CodeType, code: CodeType) -> tuple[int, ...] | None:
    """Return the indices of constants that lead from a code to one inside it; None if none do."""
    if around is code:
        return ()
    for i, constant in enumerate(around.co_consts):
        if isinstance(constant, CodeType):
            way = _way(constant, code)
            if way is not None:
                return (i, *way)
    return None


def _found(module: str, path: tuple[str, ...], way: tuple[int, ...], name: str) -> LocalCode:
    """Return the code that `LocalCode.__reduce__` has described."""
    __import__(module)
    function: Any = sys.modules[module]
    namespace = vars(function)
    for step in path:
        function = vars(function)[step]
    code = function.__code__
    for index in way:
        constants = code.co_consts
        code = constants[index] if index < len(constants) else None
    if not isinstance(code, CodeType):
        raise InputError(
            f"{'.'.join(path)} of {module} is another one than when the net was pickled. "
            "Hint: cut the model again, and load its weights"
        )
    made = LocalCode.__new__(LocalCode)
    made._set(code, namespace, name)
    return made
