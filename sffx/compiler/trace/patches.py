"""Functions of torch that do not know proxies, replaced while a trace runs."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Distribution
from torch.jit._state import _try_get_jit_cached_function
from torch.nn.modules import transformer
from torch.utils import checkpoint

from sffx.compiler.trace.assigned_data import assign_data
from sffx.compiler.trace.checkpointing import generators
from sffx.compiler.trace.flags import mode_property
from sffx.compiler.trace.listed import is_listed, tensor_of
from sffx.compiler.trace.mapped import transforms_replaced
from sffx.compiler.trace.named_functions import (
    bound_in_files,
    bound_in_model,
    caches,
    kinds_of_proxies,
)
from sffx.compiler.trace.proxy import ShapeOf, has_proxy, has_size
from sffx.compiler.trace.randomness import DRAWS, OWN_GENERATOR, DrawnNumber
from sffx.compiler.trace.regions import is_of_torch
from sffx.compiler.trace.replaced import replaced

if TYPE_CHECKING:
    from sffx.compiler.trace.functions import Callee
    from sffx.compiler.trace.tracer import GuidedTracer

# These take sizes, dtypes or numbers, and torch's own parser of arguments knows no proxies.
_FACTORIES = ("zeros", "ones", "empty", "finfo", "iinfo")

# Their first argument holds the values, while that of the others holds sizes.
_FACTORIES_OF_VALUES = ("tensor", "as_tensor")

# Here torch's parser would take the example's number from the proxy of a size, and freeze it.
_FUNCTIONS_OF_SIZES = (
    *("full", "eye", "arange", "linspace", "logspace"),
    *("broadcast_to", "tile", "reshape", "roll", "narrow", "as_strided", "unflatten"),
    *("split", "chunk", "repeat_interleave", "multinomial", "tril_indices", "triu_indices"),
    "broadcast_shapes",
)
_METHODS_OF_SIZES = (
    *("expand", "repeat", "tile", "broadcast_to", "view", "reshape", "roll", "narrow"),
    *("as_strided", "unflatten", "split", "chunk", "repeat_interleave", "multinomial"),
    *("new_zeros", "new_ones", "new_empty", "new_full"),
)

# What a forward may ask of torch, and a graph would freeze.
_ASKED = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")

# Functions that draw a number for code beside the graph, between 0 and 1 by default.
_NUMBERS_OF_NUMPY = ("rand", "random", "random_sample", "uniform")
_NUMBERS_OF_PYTHON = ("random", "uniform")

# Other functions that draw for code beside the graph.
_DRAWS_OF_NUMPY = (
    *("beta", "binomial", "choice", "exponential", "gamma", "normal", "permutation", "poisson"),
    *("randint", "randn", "shuffle", "standard_normal"),
)
_DRAWS_OF_PYTHON = (
    *("betavariate", "choice", "choices", "gauss", "normalvariate", "randint", "randrange"),
    *("sample", "shuffle"),
)

# Functions that draw a tensor of a given size.
_DRAWS_OF_TORCH = ("rand", "randn", "randint", "randperm", "normal")


class Patches:
    """What stands in for torch's functions during one trace.

    Attributes:
        tracer: creates the nodes.
        probe: the model that is traced.
        checkpointed: whether gradient checkpointing was met. It changes no value, and is left out
            of the graph.
        unvalidated: whether a distribution was made, whose checks of values are left out.
    """

    def __init__(self, tracer: GuidedTracer, probe: nn.Module) -> None:
        self.tracer = tracer
        self.probe = probe
        self.checkpointed = False
        self.unvalidated = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the functions, and put torch's own back at the end."""
        # torch keeps the result of this call for ever, and fx asks for it during a trace. Asked
        # here first, it holds torch's own functions. Else it would hold ours, and so the tracer.
        torch.overrides.get_overridable_functions()
        with ExitStack() as stack:
            stack.enter_context(_removed(fx.Proxy, "__call__"))
            for owner, name, stand_in in self._stand_ins():
                stack.enter_context(replaced(owner, name, stand_in))
            stack.enter_context(kinds_of_proxies())
            stack.enter_context(self.tracer.functions.asked.replaced())
            yield

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield what has a function to replace, the function's name, and what replaces it."""
        yield from self._of_sizes()
        yield from self._of_regions()
        yield from self._of_draws()
        yield from self._of_found_functions()
        yield from caches()
        yield from self._of_compiled_code()
        yield from self._of_classes()
        yield from self._of_checkpoints()
        yield Distribution, "_validate_args", self._unvalidated()
        yield from transforms_replaced(self.tracer)
        yield nn.Module, "__setattr__", self._setting(nn.Module.__setattr__)
        yield nn.Module, "training", mode_property(self.tracer.mode_of)
        yield torch.Tensor, "data", self._data()
        detect = transformer._detect_is_causal_mask
        yield transformer, "_detect_is_causal_mask", functools.partial(_detect_causal, detect)
        yield torch, "_check_with", functools.partial(_check, torch._check_with)

    def _of_sizes(self) -> Iterator[tuple[Any, str, Any]]:
        yield torch, "Size", ShapeOf
        for name in _FACTORIES:
            yield torch, name, functools.partial(self._make, getattr(torch, name))
        for name in _FACTORIES_OF_VALUES:
            yield torch, name, functools.partial(self._make_of_values, getattr(torch, name))
        for name in _FUNCTIONS_OF_SIZES:
            yield torch, name, functools.partial(self._with_sizes, getattr(torch, name))
        for name in _METHODS_OF_SIZES:
            yield torch.Tensor, name, self._method_with_sizes(name)

    def _of_regions(self) -> Iterator[tuple[Any, str, Any]]:
        switch = torch._C._set_grad_enabled
        switch_gradients = functools.partial(self.tracer.regions.switch_gradients, switch)
        yield torch._C, "_set_grad_enabled", switch_gradients
        contexts = (
            (torch.autocast, self._enter_autocast),
            (torch.enable_grad, self._enter_enable_grad),
            (saved_tensors_hooks, self._enter_hooks),
        )
        for context, note in contexts:
            yield context, "__enter__", self._around(context.__enter__, note)
        for name in _ASKED:
            answer = functools.partial(self.tracer.regions.answer, getattr(torch, name))
            yield torch, name, answer

    def _of_draws(self) -> Iterator[tuple[Any, str, Any]]:
        draws: tuple[tuple[Any, tuple[str, ...], Callable[..., Any]], ...] = (
            (torch, _DRAWS_OF_TORCH, self._draw_tensor),
            (random, _NUMBERS_OF_PYTHON, self._draw),
            (np.random, _NUMBERS_OF_NUMPY, self._draw),
            (np.random, _DRAWS_OF_NUMPY, self._refuse),
            (random, _DRAWS_OF_PYTHON, self._refuse),
        )
        for owner, names, stand_in in draws:
            for name in names:
                yield owner, name, functools.partial(stand_in, getattr(owner, name))

    def _of_found_functions(self) -> Iterator[tuple[Any, str, Any]]:
        for callee in self.tracer.functions.found.values():
            for place, name in callee.places:
                yield place, name, self._runner(callee)

    def _of_compiled_code(self) -> Iterator[tuple[Any, str, Any]]:
        # C++ code would take a proxy, which says that it is a tensor, for one in memory, and end
        # the process.
        apply = vars(Function)["apply"]
        yield Function, "apply", classmethod(functools.partial(self._apply, apply))
        # `spike = Spike.apply` is bound before the trace, to torch's own.
        bound_before = (*bound_in_files(), *bound_in_model(self.probe))
        for owner, name, kind in bound_before:
            stand_in = functools.partial(self._apply, apply, kind)
            # A function in a class would be a method.
            is_in_class = isinstance(owner, type)
            yield owner, name, staticmethod(stand_in) if is_in_class else stand_in
        call = torch._C.ScriptFunction.__call__
        yield torch._C.ScriptFunction, "__call__", self._script_caller(call)

    def _of_classes(self) -> Iterator[tuple[Any, str, Any]]:
        for kind in {type(module) for module in self.probe.modules()}:
            before_module = kind.__mro__[: kind.__mro__.index(nn.Module)]
            for base in before_module:
                call = vars(base).get("__call__")
                if call is not None and issubclass(base, nn.Module):
                    yield base, "__call__", self._caller(call)

    def _of_checkpoints(self) -> Iterator[tuple[Any, str, Any]]:
        for name in generators():
            yield checkpoint, name, self._without_checkpoint

    def _make(self, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Record `torch.zeros(b, t)` and its like where a size or a dtype is a proxy."""
        self._require_no_generator(kwargs)
        if has_proxy(args, kwargs):
            return self.tracer.create_proxy("call_function", factory, args, kwargs)
        return factory(*args, **kwargs)

    def _make_of_values(self, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Record `torch.tensor(values)` where a value is a proxy, or where they are a tensor's."""
        if args and is_listed(args[0]):
            return tensor_of(*args, **kwargs)
        return self._make(factory, *args, **kwargs)

    def _with_sizes(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Record a function that is given a proxy of a size."""
        self._require_no_generator(kwargs)
        if has_size(args, kwargs):
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    def _method_with_sizes(self, name: str) -> Callable[..., Any]:
        """Return a method of tensors that records its call where it is given a proxy of a size.

        Constants need it. What a proxy is asked is recorded anyway.
        """
        original = getattr(torch.Tensor, name)

        @functools.wraps(original)
        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if has_size(args, kwargs):
                return self.tracer.create_proxy("call_method", name, (tensor, *args), kwargs)
            return original(tensor, *args, **kwargs)

        return method

    def _data(self) -> property:
        """Return a property that records the `.data` of parameters without a proxy.

        A forward that goes through `parameters()` has such parameters.
        """
        original: Any = torch.Tensor.data

        def read(tensor: torch.Tensor) -> Any:
            if self.tracer.is_untraced(tensor):
                proxy = self.tracer.proxy(self.tracer.create_arg(tensor))
                return self.tracer.create_proxy("call_function", getattr, (proxy, "data"), {})
            return original.__get__(tensor)

        def write(tensor: torch.Tensor, value: Any) -> None:
            if self.tracer.is_untraced(tensor):
                assign_data(self.tracer.proxy(self.tracer.create_arg(tensor)), value)
            else:
                original.__set__(tensor, value)

        return property(read, write)

    def _setting(self, set_attribute: Callable[..., None]) -> Callable[..., None]:
        """Return what stands in for `__setattr__`, and refuses to set the mode of a module."""

        def setting(module: nn.Module, name: str, value: Any) -> None:
            if name == "training" and not self.tracer.is_running:
                self.tracer.refuse_mode(module)
            set_attribute(module, name, value)

        return setting

    def _unvalidated(self) -> property:
        """Return a property by which distributions do not look at the values of their arguments.

        What they raise for wrong ones is no part of a graph.
        """

        def read(_: Distribution) -> bool:
            if not self.tracer.is_running:
                self.unvalidated = True
            return False

        def write(distribution: Distribution, value: bool) -> None:
            vars(distribution)["_validate_args"] = value

        return property(read, write)

    def _around(self, enter: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
        """Return what stands in for the `__enter__` of a context manager that is to be noted."""

        @functools.wraps(enter)
        def entered(context: Any) -> Any:
            if not self.tracer.is_running:
                note(context)
            return enter(context)

        return entered

    def _enter_autocast(self, context: Any) -> None:
        self.tracer.regions.enter_autocast(context._enabled, self.tracer.place)

    def _enter_enable_grad(self, _: Any) -> None:
        # Distributions enter it for some attributes, whose gradients the graph has as well. Frame 1
        # is that of `entered`, and frame 2 that of the code with the context.
        if not is_of_torch(sys._getframe(2)):
            self.tracer.regions.enter_enable_grad(self.tracer.place)

    def _enter_hooks(self, context: Any) -> None:
        self.tracer.regions.enter_hooks(type(context))

    def _draw(self, draw: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for what draws a number; a node that runs on its example may draw."""
        if self.tracer.is_running:
            return draw(*args, **kwargs)
        # Of other ranges, and of arrays, `DrawnNumber` knows no outcome of a comparison.
        if kwargs or args not in ((), (0.0, 1.0)):
            raise RuntimeError(DRAWS)
        return DrawnNumber()

    def _refuse(self, draw: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for what draws something that a graph would freeze."""
        if self.tracer.is_running:
            return draw(*args, **kwargs)
        raise RuntimeError(DRAWS)

    def _runner(self, callee: Callee) -> Callable[..., Any]:
        """Return what stands in for a function that the graph is to call."""

        @functools.wraps(callee.function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.tracer.run_function(callee, args, kwargs)

        return run

    def _draw_tensor(self, draw: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Record `torch.rand(1)` and its like, which then draw in each call of the graph."""
        self._require_no_generator(kwargs)
        is_sized = has_proxy(args, kwargs)
        if self.tracer.is_running or ("out" in kwargs and not is_sized):
            return draw(*args, **kwargs)
        # After a seed, as in `torch.random.fork_rng()`, each call draws the same constant.
        if not is_sized and self.tracer.has_generator_moved:
            return draw(*args, **kwargs)
        return self.tracer.create_proxy("call_function", draw, args, kwargs)

    def _require_no_generator(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("generator") is not None and not self.tracer.is_running:
            raise RuntimeError(OWN_GENERATOR)

    def _apply(self, apply: Any, kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        """Stand in for `Function.apply` of the class `kind`."""
        if not has_proxy(args, kwargs):
            return apply.__get__(None, kind)(*args, **kwargs)
        if kind is checkpoint.CheckpointFunction:
            function, _, *inputs = args
            self.checkpointed = True
            return function(*inputs)
        return self.tracer.apply(kind, args, kwargs)

    def _script_caller(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method for scripted functions; a bound method would not be given the script."""

        def call_script(script: Any, *args: Any, **kwargs: Any) -> Any:
            if not has_proxy(args, kwargs):
                return call(script, *args, **kwargs)
            function = _scripted_function(script)
            if function is None:
                raise RuntimeError(f"it calls the script {script.name}, which a graph cannot hold")
            return function(*args, **kwargs)

        return call_script

    def _caller(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method for classes with a `__call__`; see `ModuleCalls.call_by_class`."""

        # Whether a module is a leaf depends on its signature, which is to stay.
        @functools.wraps(call)
        def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.tracer.calls.call_by_class(call, module, *args, **kwargs)

        return call_module

    def _without_checkpoint(self, *_: Any, **__: Any) -> Iterator[None]:
        """Stand in for what checkpointing does before and after a function: nothing."""
        self.checkpointed = True
        yield


def _detect_causal(detect: Callable[..., bool], mask: Any, *args: Any, **kwargs: Any) -> bool:
    """Stand in for what looks at the values of a mask. A mask known as causal only saves time."""
    is_known = bool(args and args[0]) or bool(kwargs.get("is_causal"))
    is_traced = has_proxy(mask, args, kwargs)
    return is_known if is_traced else detect(mask, *args, **kwargs)


def _check(check: Callable[..., Any], error: Any, condition: Any, *more: Any) -> Any:
    """Stand in for `torch._check_with`, which takes a truth value and no proxy of one."""
    return check(error, bool(condition), *more)


def _scripted_function(script: Any) -> Callable[..., Any] | None:
    """Return the function that `torch.jit.script` has compiled, which computes the same.

    A script that `torch.jit.trace` has recorded may compute something else than its function, since
    it keeps what the function did with the example. So it has none, and neither has one of a file.
    """
    function = getattr(script, "_torchdynamo_inline", None)
    if function is None:
        return None
    compiled = _try_get_jit_cached_function(function)
    is_compiled = compiled is not None and compiled.qualified_name == script.qualified_name
    return function if is_compiled else None


@contextmanager
def _removed(owner: type, name: str) -> Iterator[None]:
    """Take a method from a class: `callable(x)` must say of a proxy what it says of a tensor."""
    original = vars(owner)[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, original)
