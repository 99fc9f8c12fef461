"""Functions and methods that a trace cannot look into. The graph calls them, and they run for real.

Such a function draws with NumPy, reads values of a tensor, or counts samples. Without this, the
whole module whose forward calls it would be a leaf.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

import numpy as np
from torch import Generator, Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sffx.compiler.trace.batch_numbers import AskedBuiltins
from sffx.compiler.trace.code_names import FOREIGN, functions_reached, names_in, package_of
from sffx.compiler.trace.randomness import OWN_GENERATOR, DrawnNumber
from sffx.compiler.trace.run_function import FunctionTarget, OwnMethod, name_of
from sffx.compiler.walks import numbers_behind

_PLAIN = (Tensor, np.ndarray, np.generic, bool, int, float, str, type(None))


@dataclass(frozen=True)
class Callee:
    """A function that the graph calls.

    Attributes:
        function: as the code of the model calls it.
        places: the modules or the class that hold it, each with the name there.
        is_method: whether its first argument is a module.
        reason: why it is not traced.
    """

    function: Callable[..., Any]
    places: tuple[tuple[Any, str], ...]
    is_method: bool
    reason: str

    @property
    def name(self) -> str:
        """The name of the function. A decorated method has the name that its class gives it."""
        if self.is_method:
            _owner, name = self.places[0]
            return name
        return name_of(self.function)


class Functions:
    """The functions that the graph of a model calls.

    Attributes:
        found: by the functions themselves.
        asked: builtins that return plain numbers.
    """

    def __init__(self) -> None:
        self.asked = AskedBuiltins()
        self.found: dict[Callable[..., Any], Callee] = {}
        self._given_up: dict[Callable[..., Any], Callee] = {}
        self._has_given_up = False  # since the last trace

    def give_up(self, callee: Callee) -> None:
        """Let a function be traced again, or the module that calls it be a leaf."""
        self.found.pop(callee.function, None)
        self._given_up[callee.function] = callee
        self._has_given_up = True

    def has_tried(self, failure: Exception) -> bool:
        """Return whether a trace failed in a function that the graph could not call either.

        Methods do not count: as functions, they could be given what they read of their module.
        """
        tried = []
        for callee in self._given_up.values():
            if not callee.is_method and isinstance(callee.function, FunctionType):
                tried.append(callee.function)
        for frame in _frames_of_forward(failure.__traceback__):
            if any(_is_run_by(function, frame) for function in tried):
                return True
        return False

    def add(self, failure: Exception, reason: str) -> bool:
        """Find the innermost function that a trace has failed in, to call it from now on.

        Args:
            failure: of the trace.
            reason: what went wrong.

        Returns:
            Whether to trace again: a function was found, or one was given up since the last trace,
            which did not look into it.
        """
        if self._has_given_up:
            self._has_given_up = False
            return True
        frames = _frames_of_forward(failure.__traceback__)
        calls = list(pairwise(frames))
        for caller, frame in reversed(calls):
            callee = _callee(caller, frame, reason)
            if callee is None:
                continue
            if callee.function not in self._given_up and callee.function not in self.found:
                self.found[callee.function] = callee
                return True
        return False

    def notes(self, graph: fx.Graph) -> Iterator[str]:
        """Yield what to say of the functions that a graph calls."""
        called = set()
        for node in graph.nodes:
            if isinstance(node.target, FunctionTarget):
                called.add(name_of(node.target.function))
        for callee in self.found.values():
            if callee.name in called:
                yield f"{callee.name} runs as a whole: {callee.reason}"


def depends_on_function(node: fx.Node) -> bool:
    """Whether a number or a truth value comes from a function that the graph calls."""
    return any(isinstance(each.target, FunctionTarget) for each in numbers_behind(node))


def require_plain_values(value: Any) -> None:
    """Raise a RuntimeError if a function returns what a graph cannot hand on."""
    for leaf in tree_leaves(value):
        if not isinstance(leaf, _PLAIN):
            raise RuntimeError(f"a function returns a {type(leaf).__name__}")


def bound(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a function that has the keyword arguments which a graph cannot hold, and the others.

    Raises:
        RuntimeError: it is given a module, whose parameters the graph would not know of.
    """
    if any(isinstance(leaf, nn.Module) for leaf in tree_leaves((args, kwargs))):
        raise RuntimeError("a function is given a module")
    held: dict[str, Any] = {}
    passed: dict[str, Any] = {}
    for name, value in kwargs.items():
        if all(_can_be_argument(leaf) for leaf in tree_leaves(value)):
            passed[name] = value
        else:
            held[name] = value
    return (functools.partial(function, **held) if held else function), passed


def _can_be_argument(value: Any) -> bool:
    # The tracer refuses a drawn number among the arguments. Held by the function, it would pass.
    return isinstance(value, (*_PLAIN, fx.Proxy, DrawnNumber)) or type(value).__module__ == "torch"


def _frames_of_forward(traceback: TracebackType | None) -> list[FrameType]:
    """Return the frames since the innermost call of a module, without those of foreign code."""
    frames: list[FrameType] = []
    while traceback is not None:
        frame = traceback.tb_frame
        # By these the tracer begins the forward of a module and that of the model.
        is_start = frame.f_code.co_name in ("call_module", "create_args_for_root")
        if is_start and _is_own(frame):
            frames = []
        frames.append(frame)
        traceback = traceback.tb_next
    return [frame for frame in frames if not _is_foreign(frame)]


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("sffx.")


def _is_foreign(frame: FrameType) -> bool:
    return package_of(frame.f_globals) in FOREIGN


def _callee(caller: FrameType, frame: FrameType, reason: str) -> Callee | None:
    """Return the function or the method of a module that a frame runs, None where it is none."""
    method = _method(frame)
    if method is not None:
        kind, name = method
        return Callee(vars(kind)[name], (method,), True, reason)
    namespaces = (caller.f_globals, *_modules_named(caller), frame.f_globals)
    for namespace in namespaces:
        for value in list(namespace.values()):
            if isinstance(value, FunctionType) and _is_run_by(value, frame):
                return Callee(value, tuple(_places(value, namespaces)), False, reason)
    return None


def _modules_named(caller: FrameType) -> list[dict[str, Any]]:
    """Return the contents of the modules that the code of a frame names, as `a` and `b` in `a.b.f`.

    Those of torch, of Python and the like do not count.
    """
    around = [caller.f_globals]
    # Of `a.b.f` the code names a before b, so b is found in what a holds.
    for name in caller.f_code.co_names:
        for namespace in tuple(around):
            value = namespace.get(name)
            if isinstance(value, ModuleType) and package_of(vars(value)) not in FOREIGN:
                around.append(vars(value))
    return around[1:]


def _is_run_by(function: FunctionType, frame: FrameType) -> bool:
    """Return whether a frame runs a function, or what the function wraps.

    A decorator makes functions of one code, which hold different things.
    """
    if inspect.unwrap(function).__code__ is frame.f_code:
        return True
    if function.__code__ is not frame.f_code:
        return False
    held = inspect.getclosurevars(function).nonlocals
    return all(frame.f_locals.get(name) is value for name, value in held.items())


def _method(frame: FrameType) -> tuple[type, str] | None:
    """Return the class and the name of the method of a module that a frame runs."""
    first = frame.f_code.co_varnames[:1]
    owner = frame.f_locals.get(first[0]) if first else None
    if not isinstance(owner, nn.Module):
        return None
    for kind in type(owner).__mro__:
        for name, value in vars(kind).items():
            is_it = isinstance(value, FunctionType) and value.__code__ is frame.f_code
            if is_it and name not in ("forward", "__call__"):
                return kind, name
    return None


def _places(
    function: FunctionType, namespaces: Sequence[dict[str, Any]]
) -> Iterator[tuple[Any, str]]:
    """Yield each module, of those with the given contents, and the name of a function in it."""
    names = {str(each.get("__name__")): None for each in namespaces}
    for module in [sys.modules[name] for name in names if name in sys.modules]:
        for name, value in list(vars(module).items()):
            if value is function:
                yield module, name


def own_method(callee: Callee, module: nn.Module) -> OwnMethod:
    """Return a method of a module that the graph calls.

    Args:
        callee: the method.
        module: of the model with values.

    Raises:
        RuntimeError: it names a parameter, a buffer or a child of the module, even in a branch that
            did not run. Or the module has a generator of random numbers, which a trace would
            advance.
    """
    if any(isinstance(value, Generator) for value in vars(module).values()):
        raise RuntimeError(OWN_GENERATOR)
    name = callee.name
    held = {*module._parameters, *module._buffers, *module._modules}
    used = held.intersection(words_of(callee.function, type(module)))
    if used:
        raise RuntimeError(f"the method {name} uses {min(used)!r} of its module")
    return OwnMethod(module, name)


def words_of(method: Callable[..., Any], kind: type) -> Iterator[str]:
    """Yield the names and the texts in the code that a method of a class reaches."""
    function = inspect.unwrap(method)
    if not isinstance(function, FunctionType):
        return
    for each in functions_reached([function], kind):
        yield from names_in(each.__code__)
        for constant in each.__code__.co_consts:
            if isinstance(constant, str):  # as in `getattr(self, "layer")`
                yield constant
