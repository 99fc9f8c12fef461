"""Calls of `torch.vmap` in a forward, which a graph makes as a whole.

The function that is mapped is often made in the forward, and holds traced values or the module:

    torch.vmap(lambda row: self.layer(row) * scale)(x)

A graph cannot hold such a function. So the trace makes a template of it, as a compiler converts a
closure: what the function holds becomes an argument of the node. Each call fills the template.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.utils._pytree import tree_map

from sffx.compiler.trace.functions import words_of
from sffx.compiler.trace.proxy import has_proxy
from sffx.compiler.trace.run_function import function_target

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer


def run_mapped(
    tracer: GuidedTracer,
    vmap: Callable[..., Any],
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Let the graph map a function over the samples, or over another axis that `vmap` is given.

    Args:
        tracer: makes the graph.
        vmap: maps the function.
        function: is mapped.
        args: of the call, as `vmap` takes them.
        kwargs: of the call.
    """
    place = tracer.place
    paths = tracer.submodule_paths or {}

    def is_running(module: nn.Module) -> bool:
        path = paths[module]
        return not path or path == place or place.startswith(f"{path}.")

    templates = _Templates(is_running, paths.__contains__)
    mapped = _Mapped(vmap, templates.of(function))
    if not templates.held and not has_proxy(args, kwargs):
        return vmap(function, *args, **kwargs)
    target = function_target(tracer.graph, tracer.runner.probe, place, mapped)
    return tracer.create_proxy("call_module", target, (templates.held, *args), kwargs)


class _Mapped:
    """Fills the template of a function, and maps the function.

    Args:
        vmap: of torch.
        template: of the function.
    """

    __name__ = "vmap"

    def __init__(self, vmap: Callable[..., Any], template: Any) -> None:
        self.vmap = vmap
        self.template = template

    def __call__(self, held: list[Any], *args: Any, **kwargs: Any) -> Any:
        return self.vmap(_filled(self.template, held), *args, **kwargs)


@dataclass(frozen=True)
class _Slot:
    """The place of a value that each call gives, by its index."""

    index: int


@dataclass(frozen=True)
class _Rebuilt:
    """An object that each call makes anew, from parts that are templates."""

    make: Callable[..., Any]
    parts: Any


class _Templates:
    """Makes templates of functions.

    Args:
        is_running: whether the forward of a module of the model is being traced. The template of
            such a module has what the function names of it. Other modules fill slots.
        is_of_model: whether a module belongs to the model.

    Attributes:
        held: what fills the slots, in their order.
    """

    def __init__(
        self,
        is_running: Callable[[nn.Module], bool],
        is_of_model: Callable[[nn.Module], bool],
    ) -> None:
        self._is_running = is_running
        self._is_of_model = is_of_model
        # The functions of which a template is being made, the innermost last.
        self._around: list[FunctionType] = []
        self.held: list[Any] = []

    def of(self, value: Any) -> Any:
        """Return a value with a slot in the place of each traced value and module in it."""
        return tree_map(self._of_leaf, value)

    def _of_leaf(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            return self._slot(value)
        if isinstance(value, nn.Module) and self._is_of_model(value):
            return self._of_module(value) if self._is_running(value) else self._slot(value)
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            return _Rebuilt(_made_partial, self.of(parts))
        if isinstance(value, MethodType) and isinstance(value.__func__, FunctionType):
            return self._of_function(value.__func__, value.__self__)
        return self._of_function(value) if isinstance(value, FunctionType) else value

    def _slot(self, value: Any) -> _Slot:
        self.held.append(value)
        return _Slot(len(self.held) - 1)

    def _of_function(self, function: FunctionType, owner: Any = None) -> _Rebuilt:
        """Return the template of a function, or of the method of an owner."""
        if function in self._around:
            raise RuntimeError(f"{function.__name__}, which is mapped, holds itself")
        self._around.append(function)
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
        defaults = (function.__defaults__, function.__kwdefaults__)
        parts = self.of((contents, defaults, owner))
        self._around.pop()
        return _Rebuilt(functools.partial(_made_function, function), parts)

    def _of_module(self, module: nn.Module) -> _Rebuilt:
        """Return the template of a module, with what the functions around name of it."""
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
        parts = self.of((state, attributes))
        return _Rebuilt(functools.partial(_made_module, type(module)), parts)


def _filled(template: Any, held: list[Any]) -> Any:
    """Return what a template stands for, with the held values in its slots."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, _Slot):
            return held[leaf.index]
        return leaf.make(*_filled(leaf.parts, held)) if isinstance(leaf, _Rebuilt) else leaf

    return tree_map(fill, template)


def _made_partial(function: Any, args: Any, keywords: Any) -> Any:
    return functools.partial(function, *args, **keywords)


def _made_function(
    function: FunctionType, contents: list[Any], defaults: Any, owner: Any
) -> FunctionType | MethodType:
    """Return a function with other contents and defaults, as a method where there is an owner."""
    cells = tuple(map(CellType, contents))
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults[0], cells
    )
    made.__kwdefaults__ = defaults[1]
    return made if owner is None else MethodType(made, owner)


def _made_module(
    kind: type[nn.Module], state: dict[str, Any], attributes: dict[str, Any]
) -> nn.Module:
    made = kind.__new__(kind)
    made.__dict__.update({**vars(nn.Module()), **state, **attributes})
    return made
