"""Calls of `torch.vmap` in a forward, which a graph makes as a whole.

The function that is mapped is often made in the forward, and holds traced values or the module:

    torch.vmap(lambda row: self.layer(row) * scale)(x)

So it is taken apart: what it holds becomes an argument of the node, and at each call a function is
made that holds what is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_map

from sffx.compiler.trace.functions import words_of


class MappedCall:
    """Calls what maps a function, with a function that holds what is given.

    Attributes:
        call: `vmap` itself, of torch.
        function: that is mapped, taken apart.
    """

    __name__ = "vmap"

    def __init__(self, call: Callable[..., Any], function: Any) -> None:
        self.call = call
        self.function = function

    def __call__(self, held: list[Any], *args: Any, **kwargs: Any) -> Any:
        return self.call(_filled(self.function, held), *args, **kwargs)


@dataclass(frozen=True)
class _Given:
    """Stands for what is given at each call, at some place."""

    place: int


@dataclass(frozen=True)
class _Apart:
    """Stands for an object that is made anew at each call, of parts that are taken apart."""

    make: Callable[..., Any]
    parts: Any


class TakesApart:
    """Takes functions apart.

    Args:
        is_running: whether the forward of a module of the model is being traced. Such a module
            becomes a shell, with what the function names of it; others are given as they are.
        is_of_model: whether a module belongs to the model.

    Attributes:
        held: what the functions hold, in the order of their places.
    """

    def __init__(
        self,
        is_running: Callable[[nn.Module], bool],
        is_of_model: Callable[[nn.Module], bool],
    ) -> None:
        self._is_running = is_running
        self._is_of_model = is_of_model
        self._around: list[FunctionType] = []
        self.held: list[Any] = []

    def apart(self, value: Any) -> Any:
        """Return a value with `_Given` in the place of each traced value and module in it."""
        return tree_map(self._leaf_apart, value)

    def _leaf_apart(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return self._given(value)
        if isinstance(value, nn.Module) and self._is_of_model(value):
            return self._shell(value) if self._is_running(value) else self._given(value)
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            return _Apart(_made_partial, self.apart(parts))
        if isinstance(value, MethodType):
            return self._method_apart(value)
        return self._function_apart(value) if isinstance(value, FunctionType) else value

    def _given(self, value: Any) -> _Given:
        self.held.append(value)
        return _Given(len(self.held) - 1)

    def _method_apart(self, method: MethodType) -> Any:
        function = method.__func__
        if not isinstance(function, FunctionType):
            return method
        self._around.append(function)
        parts = self.apart((function, method.__self__))
        self._around.pop()
        return _Apart(_made_method, parts)

    def _function_apart(self, function: FunctionType) -> Any:
        if function in self._around[:-1]:
            raise RuntimeError(f"{function.__name__}, which is mapped, holds itself")
        self._around.append(function)
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
        defaults = (function.__defaults__, function.__kwdefaults__)
        parts = self.apart((contents, defaults))
        self._around.pop()
        return _Apart(functools.partial(_made_function, function), parts)

    def _shell(self, module: nn.Module) -> _Apart:
        """Return a module with what the functions around name of it, and nothing else."""
        words = {word for each in self._around for word in words_of(each, type(module))}
        state: dict[str, dict[str, Any]] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        attributes: dict[str, Any] = {}
        for name in sorted(words):
            kind = next((kind for kind in state if name in vars(module)[kind]), None)
            if name == "training":
                attributes[name] = module.training
            elif kind is not None:
                state[kind][name] = getattr(module, name)
            elif name in vars(module):
                attributes[name] = vars(module)[name]
        parts = self.apart((state, attributes))
        return _Apart(functools.partial(_made_shell, type(module)), parts)


def _filled(value: Any, held: list[Any]) -> Any:
    def fill(leaf: Any) -> Any:
        if isinstance(leaf, _Given):
            return held[leaf.place]
        return leaf.make(*_filled(leaf.parts, held)) if isinstance(leaf, _Apart) else leaf

    return tree_map(fill, value)


def _made_partial(function: Any, args: Any, keywords: Any) -> Any:
    return functools.partial(function, *args, **keywords)


def _made_method(function: FunctionType, owner: Any) -> MethodType:
    return MethodType(function, owner)


def _made_function(function: FunctionType, contents: list[Any], defaults: Any) -> FunctionType:
    cells = tuple(map(CellType, contents))
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults[0], cells
    )
    made.__kwdefaults__ = defaults[1]
    return made


def _made_shell(
    kind: type[nn.Module], state: dict[str, Any], attributes: dict[str, Any]
) -> nn.Module:
    shell = kind.__new__(kind)
    shell.__dict__.update({**vars(nn.Module()), **state, **attributes})
    return shell
