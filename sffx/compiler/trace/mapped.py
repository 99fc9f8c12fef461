"""Calls of `torch.vmap`, `torch.func.grad` and their like, which a graph makes as a whole.

The function that they transform is often made in the forward, and holds traced values or the
module:

    torch.vmap(lambda row: self.layer(row) * scale)(x)

A graph cannot hold such a function. So the trace makes a template of it, as a compiler converts a
closure: what the function holds becomes an argument of the node. Each call fills the template.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch._functorch import apis, eager_transforms
from torch.utils._pytree import tree_map

from sffx.compiler.trace.functions import words_of
from sffx.compiler.trace.local_code import LocalCode
from sffx.compiler.trace.proxy import has_proxy
from sffx.compiler.trace.run_function import function_target

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer


def transforms_replaced(tracer: GuidedTracer) -> Iterator[tuple[Any, str, Any]]:
    """Yield what torch's transforms call in the end, with its name, and what stands in for it.

    A forward may have imported `torch.func.grad` itself under any name.
    """
    places = (
        (apis, "vmap_impl", run_transformed),
        (eager_transforms, "grad_impl", run_transformed),
        (eager_transforms, "grad_and_value_impl", run_transformed),
        (eager_transforms, "_jvp_with_argnums", run_transformed),
        (eager_transforms, "_vjp_with_argnums", run_vjp),
        # The second result of a vjp calls it, by which the graph gets a node for that result.
        (sys.modules[__name__], "_vjp_impl", run_transformed),
    )
    for place, name, run in places:
        transform = getattr(place, name)
        yield place, name, functools.partial(_run_or_record, tracer, transform, run)


def _run_or_record(
    tracer: GuidedTracer,
    transform: Callable[..., Any],
    record: Callable[..., Any],
    function: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a transform for real inside a node that runs, and record it in a forward."""
    if tracer.is_running:
        return transform(function, *args, **kwargs)
    return record(tracer, transform, function, args, kwargs)


def run_transformed(
    tracer: GuidedTracer,
    transform: Callable[..., Any],
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Let the graph call a function that is mapped over samples, or differentiated.

    Args:
        tracer: makes the graph.
        transform: of torch, calls the transformed function.
        function: is transformed.
        args: of the call, as `transform` takes them behind the function.
        kwargs: of the call.
    """
    place = tracer.place
    paths = tracer.submodule_paths or {}

    def is_running(module: nn.Module) -> bool:
        path = paths[module]
        return not path or path == place or place.startswith(f"{path}.")

    templates = _Templates(is_running, paths.__contains__)
    transformed = _Transformed(transform, templates.of(function))
    if not templates.held and not has_proxy(args, kwargs):
        return transform(function, *args, **kwargs)
    target = function_target(tracer.graph, tracer.runner.probe, place, transformed)
    return tracer.create_proxy("call_module", target, (templates.held, *args), kwargs)


def run_vjp(
    tracer: GuidedTracer,
    vjp: Callable[..., Any],
    function: Any,
    primals: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Any, ...]:
    """Let the graph do what `torch.func.vjp` does, whose second result is a function.

    No graph can hold such a function. So the function that is differentiated is traced, and what
    the second result returns is computed by a node, which computes the function again.
    """
    returned = function(*primals)
    has_aux = options.get("has_aux")
    output, *aux = returned if has_aux else (returned,)
    # No function of this call, which would hold the tracer: it may be mapped, and run in the net.
    return (output, functools.partial(_pull_back, function, primals, options), *aux)


def _pull_back(
    function: Any, primals: Any, options: dict[str, Any], cotangents: Any, **_: Any
) -> Any:
    # During a trace another function has this name, which records the call.
    return _vjp_impl(function, primals, options, cotangents)


def _vjp_impl(function: Any, primals: Any, options: dict[str, Any], cotangents: Any) -> Any:
    _, pull_back, *_ = eager_transforms._vjp_with_argnums(function, *primals, **options)
    return pull_back(cotangents)


class _Transformed:
    """Fills the template of a function, transforms the function and calls it.

    Args:
        transform: of torch.
        template: of the function.
    """

    def __init__(self, transform: Callable[..., Any], template: Any) -> None:
        self.transform = transform
        self.template = template
        # Notes call the node by what the forward called, "vmap" for `vmap_impl`.
        name = transform.__name__.strip("_")
        self.__name__ = name.removesuffix("_impl").removesuffix("_with_argnums")

    def __call__(self, held: list[Any], *args: Any, **kwargs: Any) -> Any:
        return self.transform(_filled(self.template, held), *args, **kwargs)


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
        if isinstance(value, ModuleType):  # of Python, which cannot be copied
            return _Rebuilt(importlib.import_module, (value.__name__,))
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            return _Rebuilt(_made_partial, self.of(parts))
        if isinstance(value, MethodType) and isinstance(value.__func__, FunctionType):
            return self._of_function(value.__func__, value.__self__)
        if isinstance(value, FunctionType):
            return self._of_function(value)
        return value

    def _slot(self, value: Any) -> _Slot:
        self.held.append(value)
        return _Slot(len(self.held) - 1)

    def _of_function(self, function: FunctionType, owner: Any = None) -> _Rebuilt:
        """Return the template of a function, or of the method of an owner."""
        if function in self._around:
            raise RuntimeError(f"{function.__name__}, which torch transforms, holds itself")
        self._around.append(function)
        contents = [cell.cell_contents for cell in function.__closure__ or ()]
        defaults = (function.__defaults__, function.__kwdefaults__)
        parts = self.of((contents, defaults, owner))
        self._around.pop()
        return _Rebuilt(LocalCode(function), parts)

    def _of_module(self, module: nn.Module) -> _Rebuilt:
        """Return the template of a module, with what the functions around name of it."""
        words = {word for each in self._around for word in words_of(each, type(module))}
        state: dict[str, dict[str, Any]] = {"_parameters": {}, "_buffers": {}, "_modules": {}}
        attributes: dict[str, Any] = {}
        for name in sorted(words):
            holders = [kind for kind in state if name in vars(module)[kind]]
            if name == "training":
                attributes[name] = module.training
            elif holders:
                # Not from the holder: during a trace, a parameter is read as a traced value.
                state[holders[0]][name] = getattr(module, name)
            elif name in vars(module):
                attributes[name] = vars(module)[name]
        parts = self.of((state, attributes))
        return _Rebuilt(functools.partial(_made_module, type(module)), parts)


def _filled(template: Any, held: list[Any]) -> Any:
    """Return what a template stands for, with the held values in its slots."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, _Slot):
            return held[leaf.index]
        if isinstance(leaf, _Rebuilt):
            parts = _filled(leaf.parts, held)
            return leaf.make(*parts)
        return leaf

    return tree_map(fill, template)


def _made_partial(function: Any, args: Any, keywords: Any) -> Any:
    return functools.partial(function, *args, **keywords)


def _made_module(
    kind: type[nn.Module], state: dict[str, Any], attributes: dict[str, Any]
) -> nn.Module:
    made = kind.__new__(kind)
    made.__dict__.update({**vars(nn.Module()), **state, **attributes})
    return made
