"""Trace a model into an fx graph whose every node carries an example value, computed on fake tensors.

The example values answer what a plain trace cannot (`bool`, `len`, `iter`), while shapes stay symbolic. `self.training` stays
symbolic too: it becomes a call of a `TrainingFlag`, so that `train()` and `eval()` of the result act as they do on the original.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import pickle
import random
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd import Function
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

from sffx.blocks import Input, Leaf
from sffx.compiler.examples import DATA_DEPENDENT, TRACE_BATCH, example_arguments
from sffx.compiler.facts import Cost, Facts, change_facts, facts, set_facts
from sffx.compiler.fake import fake_copy_but_constants
from sffx.errors import InputError, TraceError, in_brief, location, way_out
from sffx.net import is_cut

_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
)
_LAYER_PACKAGES = ("torch.nn.", "torch.ao.nn.")


class TrainingFlag(nn.Module):
    """Returns its own `training`: stands in a graph for the `self.training` of the module that it is a child of."""

    def forward(self) -> bool:
        return self.training


_TRACING = threading.RLock()
_FLAG = "training_flag"
_FROZEN_BATCH = "the batch size is read as a plain number, which a graph would freeze; x.shape[0], without len() or int(), is not"
_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
_BATCHES = (
    TRACE_BATCH,
    1,
    2,
    3,
    4,
    10**6,
)  # a comparison with the same outcome at these has it at all

# What takes sizes, dtypes or numbers where torch's own parser knows no proxies.
_FACTORIES = ("zeros", "ones", "empty", "rand", "randn", "tensor", "as_tensor", "finfo", "iinfo")


class _PlantedFlag:
    """Marks, during a trace, the place of a `training` attribute; reading it creates the call of the flag at `target`."""

    def __init__(self, target: str) -> None:
        self.target = target


def _lift_flags(probe: nn.Module) -> None:
    for module in probe.modules():
        if isinstance(module._buffers.get("training"), _PlantedFlag):
            del module._buffers["training"]
            module.training = True


def is_flag(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == _FLAG


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        root: a copy of the model, which owns every module and tensor that the graph names.
        graph: of the whole model; `facts(node)` is the record of each of its nodes.
        inputs: the placeholders, as traced.
        leaves: modules with children that could not be traced.
        notes: what was found on the way.
    """

    root: nn.Module
    graph: fx.Graph
    inputs: tuple[Input, ...]
    leaves: tuple[Leaf, ...]
    notes: tuple[str, ...]


def _chance() -> tuple[Any, ...]:
    """Return the states of the generators of random numbers that a forward may draw from."""
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        pickle.dumps(np.random.get_state(legacy=False)),
    )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one thread after the other trace: fx, and `GuidedTracer.factories`, put their own in the place of torch's functions."""
    with _TRACING:
        yield


@contextmanager
def _chance_kept() -> Iterator[None]:
    """Leave the generators of random numbers as they were."""
    plain, numpys = random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpys)


@_one_at_a_time()
@_chance_kept()
def trace(model: nn.Module, example_input: Any = None, num_classes: int | None = None) -> Trace:
    """Trace a copy of `model`; the model itself is not touched and nothing is computed.

    Args:
        model: any module whose output holds logits of shape (B, J).
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments; None to infer it.
        num_classes: tells the logits among several outputs.

    Raises:
        InputError: the input cannot be inferred, or the example does not fit.
        TraceError: the top-level `forward` cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, not a torch.nn.Module. Hint: pass an instance, not a class or a function"
        )
    _require_plain(model)
    if is_cut(model):
        raise InputError(
            "the model is cut already. Hint: sffx.extract(net) gives the plain model back, which can be cut in another way"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    leaves: dict[str, str] = {}
    root = _copy(model)
    probe = fake_copy_but_constants(model, mode).train()
    arguments = example_arguments(probe, example_input, mode)
    tracer, graph = _traced(
        probe,
        lambda training: GuidedTracer(
            mode, root, arguments, leaves, num_classes, training=training
        ),
        leaves,
    )
    _adopt(root, tracer, graph)
    notes = [
        *_notes(root, graph),
        *(["gradient checkpointing in the model is left out"] if tracer.checkpointed else []),
    ]
    return Trace(root, graph, _inputs(graph, root), _leaf_records(root, leaves), tuple(notes))


def _require_plain(model: nn.Module) -> None:
    """Refuse what is wrapped round a model, and a model without values.

    Raises:
        InputError: says what to pass instead.
    """
    kind = type(model).__name__
    if isinstance(
        getattr(model, "_orig_mod", None), nn.Module
    ):  # torch.compile's, whose class takes seconds to import
        raise InputError(
            "model is compiled. Hint: pass the plain one, model._orig_mod, and compile what transform returns"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(
            f"model is wrapped in {kind}. Hint: pass model.module, and wrap sffx.LocalLoss(net) instead"
        )
    if shards_in(model):
        raise InputError(
            "model is sharded by fully_shard. Hint: transform it first, then sffx.shard(net)"
        )
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.TopLevelTracedModule)):
        raise InputError(
            f"model is a {kind}, whose code cannot be traced. Hint: pass the module that it was scripted or traced from"
        )
    empty = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if is_lazy(p)]
    if empty:
        raise InputError(
            f"{empty[0]!r} has no shape yet, as in lazy layers. Hint: run the model once, model(x)"
        )


def shards_in(module: nn.Module) -> list[Any]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called on."""
    fsdp = sys.modules.get(
        "torch.distributed.fsdp"
    )  # which takes a second to import, and what was not imported has sharded nothing
    return (
        []
        if fsdp is None
        else [each for each in module.modules() if isinstance(each, fsdp.FSDPModule)]
    )


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as cause:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {cause}. Hint: it keeps a tensor that is computed from parameters, as the old "
            "torch.nn.utils.weight_norm and pruning do; use torch.nn.utils.parametrizations, or remove the reparametrization"
        ) from cause


def _traced(
    probe: nn.Module, make_tracer: Callable[[bool], GuidedTracer], leaves: dict[str, str]
) -> tuple[GuidedTracer, fx.Graph]:
    """Trace, turning what cannot be traced into leaves until the rest can; `leaves` collects their reasons."""
    before = [
        (module, {**vars(module), "_buffers": dict(module._buffers)}) for module in probe.modules()
    ]
    while True:
        _restore(before)
        tracer = make_tracer(True)
        graph = _attempt(probe, tracer, leaves)
        if graph is None or _assign(probe, before, leaves):
            continue
        if not tracer.branched:
            return tracer, graph
        _restore(before)
        other = _attempt(probe, make_tracer(False), leaves)
        if other is None:
            continue
        if _merge_modes(graph, other, tracer.branched):
            return tracer, graph
        if "" in tracer.branched:
            raise TraceError(
                f"{type(probe).__name__}.forward computes its logits differently in train and eval mode, by a branch on self.training, "
                "which a graph cannot hold. Hint: move the branch into a submodule, or pass training=self.training to a function"
            )
        leaves.update(dict.fromkeys(tracer.branched, "branches on self.training"))


def _restore(before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Give modules the attributes that they had: what a forward has set on them may be a proxy of an earlier attempt's graph.

    Constants stay, which fx keeps on the model for the graph that reads them.
    """
    for module, attributes in before:
        for name in [
            name
            for name in vars(module)
            if name not in attributes and not name.startswith("_tensor_constant")
        ]:
            del module.__dict__[name]
        module.__dict__.update({**attributes, "_buffers": dict(attributes["_buffers"])})


def _assign(
    probe: nn.Module, before: list[tuple[nn.Module, dict[str, Any]]], leaves: dict[str, str]
) -> bool:
    """Whether modules have put traced values in the place of their buffers, which a graph would not do; they become leaves.

    Raises:
        TraceError: the model itself has.
    """
    names = {module: name for name, module in probe.named_modules()}
    found = False
    for module, _ in before:
        wrong = [
            name for name, value in module._buffers.items() if issubclass(type(value), fx.Proxy)
        ]
        if not wrong:
            continue
        if not names[module]:
            raise TraceError(
                f"{type(probe).__name__}.forward assigns its buffer {wrong[0]!r}, which a graph cannot hold. Hint: write into the buffer, "
                f"self.{wrong[0]}.copy_(...), or move this into a submodule, which then becomes a leaf"
            )
        reason = f"assigns its buffer {wrong[0]!r}"
        leaves.update(
            {
                name: reason
                for name, other in probe.named_modules()
                if type(other) is type(module) and name
            }
        )
        found = True
    return found


def _attempt(probe: nn.Module, tracer: GuidedTracer, leaves: dict[str, str]) -> fx.Graph | None:
    """Trace once; on failure inside a submodule, add all modules of its class to `leaves` and return no graph."""
    try:
        tracer.plant_flags(probe)
        with tracer.factories():
            graph = tracer._without_chance(lambda: tracer.trace(probe))
        _keep_logits(graph, probe)
    except TraceError:
        raise
    except Exception as failure:
        where, qualname = location(failure), tracer.failed
        if not qualname:
            raise TraceError(
                f"{type(probe).__name__} cannot be traced: {type(failure).__name__}: {failure} ({where}). "
                f"{way_out(probe)}. In a classifier, move this code into a submodule, which then becomes a leaf"
            ) from failure
        kind = type(probe.get_submodule(qualname))
        reason = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''} ({where})"
        leaves.update(
            {
                name: reason
                for name, module in probe.named_modules()
                if type(module) is kind and name
            }
        )
        return None
    finally:
        _lift_flags(probe)
    return graph


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _has_proxy(args: Any, kwargs: Any) -> bool:
    return any(issubclass(type(leaf), fx.Proxy) for leaf in tree_leaves((args, kwargs)))


class GuidedProxy(fx.Proxy):
    """A proxy that knows an example of its value, and answers `len`, `int` and attribute reads from it."""

    @property
    def example(self) -> Any:
        return facts(self.node).example

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.example, name)
        if callable(value) and not isinstance(value, Tensor):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Answer `isinstance(x, Tensor)` as the value would."""
        return Tensor if isinstance(facts(self.node).example, Tensor) else GuidedProxy

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise RuntimeError("it assigns the .data of a tensor, which a graph cannot hold")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return _not_the_batch(len(self.example), isinstance(self.example, Tensor))

    def __index__(self) -> int:
        return self._number(int)

    def __int__(self) -> int:
        return self._number(int)

    def __float__(self) -> float:
        return self._number(float)

    def _number(self, kind: Callable[[Any], Any]) -> Any:
        if isinstance(self.example, Tensor):
            raise RuntimeError("a number is read from a tensor, which depends on the data")
        if facts(self.node).of_batch:
            raise RuntimeError(_FROZEN_BATCH)
        return kind(self.example)


def _in_place(name: str) -> Callable[[GuidedProxy, Any], Any]:
    """Return the method for `x += y` and its like, which write on a tensor under all its names; fx would make a new one."""

    def operate(self: GuidedProxy, other: Any) -> Any:
        target = getattr(operator, f"i{name}" if isinstance(self.example, Tensor) else name)
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=name)

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(GuidedProxy, f"__i{_name}__", _in_place(_name))


def _not_the_batch(number: Any, suspect: bool) -> Any:
    """Refuse to freeze the batch size into the graph."""
    if suspect and number == TRACE_BATCH:
        raise RuntimeError(_FROZEN_BATCH)
    return number


def _is_of_batch(node: fx.Node, value: Any) -> bool:
    """Whether a node's value is a number that is a multiple of the batch size or was computed from one."""
    if not isinstance(value, (int, float)):
        return False
    return _is_multiple(value) or any(facts(arg).of_batch for arg in node.all_input_nodes)


def _is_multiple(number: Any) -> bool:
    return isinstance(number, (int, float)) and number != 0 and number % TRACE_BATCH == 0


def _is_settled(condition: fx.Node) -> bool:
    """Whether a condition is the same at every batch size: one on no batch size, or a comparison that others do not change."""
    if condition.target not in _COMPARISONS:
        return not facts(condition).of_batch
    sizes = [facts(arg).example for arg in condition.all_input_nodes if facts(arg).of_batch]
    if not all(map(_is_multiple, sizes)):
        return False
    return len({_outcome(condition, batch) for batch in _BATCHES}) == 1


def _outcome(comparison: fx.Node, batch: int) -> bool:
    sides: Any = fx.node.map_arg(comparison.args, lambda n: _at_batch(facts(n).example, batch))
    compare: Any = comparison.target
    return bool(compare(*sides))


def _at_batch(value: Any, batch: int) -> Any:
    """Return a size, or a tuple of sizes, as it would be at another batch size."""
    if isinstance(value, (tuple, list)):
        return tuple(_at_batch(size, batch) for size in value)
    return value / TRACE_BATCH * batch if _is_multiple(value) else value


class GuidedTracer(fx.Tracer):
    """Runs every node on fake tensors as it is created.

    Attributes:
        branched: qualnames of modules that branched on their `training`.
        failed: qualname of the innermost module in which the trace failed.
        checkpointed: whether gradient checkpointing was met, which changes no value and is left out of the graph.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        original: nn.Module,
        arguments: dict[str, Any],
        leaves: dict[str, str],
        num_classes: int | None,
        *,
        training: bool,
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.mode, self.original, self.arguments, self.leaves = mode, original, arguments, leaves
        self.num_classes, self.training = num_classes, training
        self.branched: set[str] = set()
        self.failed: str | None = None
        self.checkpointed = False
        self._running = False
        self._regime = _regime()
        self._alive: list[
            UntypedStorage
        ] = []  # what was saved, or its addresses would be used again

    def plant_flags(self, probe: nn.Module, qualname: str = "") -> None:
        """Replace the `training` attribute of every module that will be traced through by a `_PlantedFlag`.

        It lies among the buffers, where attribute access finds it and `Sequential`, which runs its children, does not.
        """
        for name, child in probe.named_children():
            path = f"{qualname}.{name}" if qualname else name
            if not self.is_leaf_module(child, path):
                self.plant_flags(child, path)
        if probe.__dict__.pop("training", None) is not None:
            probe._buffers["training"] = _PlantedFlag(f"{qualname}.{_FLAG}" if qualname else _FLAG)  # type: ignore[assignment]

    @contextmanager
    def factories(self) -> Iterator[None]:
        """Let `torch.zeros(b, t)` and its like be recorded when a size or a dtype is a proxy; other calls of them are as ever."""
        torch.overrides.get_overridable_functions()  # is kept once it was asked for: with the functions as they are now
        with ExitStack() as stack:
            for name in _FACTORIES:
                stack.enter_context(
                    _patched(torch, name, functools.partial(self._make, getattr(torch, name)))
                )
            # What would take a proxy, which says that it is a tensor, for one in memory, and end the process.
            apply = vars(Function)["apply"]
            stack.enter_context(
                _patched(Function, "apply", classmethod(functools.partial(self._apply, apply)))
            )
            call = torch._C.ScriptFunction.__call__
            stack.enter_context(
                _patched(
                    torch._C.ScriptFunction,
                    "__call__",
                    lambda *args, **kwargs: self._script(call, *args, **kwargs),
                )
            )
            for name in [
                name
                for name in vars(checkpoint)
                if name.startswith("_checkpoint_without_reentrant_generator")
            ]:
                stack.enter_context(_patched(checkpoint, name, self._unchecked))
            yield

    def _make(self, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return (
            self.create_proxy("call_function", factory, args, kwargs)
            if _has_proxy(args, kwargs)
            else factory(*args, **kwargs)
        )

    def _apply(self, apply: Any, kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not _has_proxy(args, kwargs):
            return apply.__get__(None, kind)(*args, **kwargs)
        if kind is checkpoint.CheckpointFunction:
            function, _, *inputs = args
            self.checkpointed = True
            return function(*inputs)
        raise RuntimeError(
            f"it calls the autograd function {kind.__name__}, which a graph cannot hold"
        )

    def _unchecked(self, *_: Any, **__: Any) -> Iterator[None]:
        """Stand in for what torch's checkpointing does around a function."""
        self.checkpointed = True
        yield

    def _script(self, call: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_proxy(args, kwargs):
            raise RuntimeError(f"it calls the script {function.name}, which a graph cannot hold")
        return call(function, *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.leaves
            or is_layer(m)
            or isinstance(m, torch.jit.ScriptModule)
        )

    def proxy(self, node: fx.Node) -> GuidedProxy:
        return GuidedProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
        factory: Any = None,
    ) -> Any:
        if _regime() != self._regime:
            raise RuntimeError(
                "a region like torch.no_grad() or torch.autocast() begins in its forward, which a graph cannot hold"
            )
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, factory)
        self._run(proxy.node)
        # None is no value: `if mask is None` must see it, also where a leaf returns it among others.
        return None if facts(proxy.node).example is None else proxy

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node and its facts: fx calls this for what a forward does and for constants that it makes."""
        node = super().create_node(kind, target, *args, **kwargs)
        set_facts(node, Facts() if kind == "output" else self._run(node))
        return node

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # not isinstance: a proxy says it is a tensor
            return a.node
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make a placeholder of each argument that is a tensor, and pass the others, fixed at their traced values, by name.

        fx would read the code object of `root_fn`, which a decorator may have replaced; what is not given takes its default.
        """
        given = {
            name: self.create_proxy("placeholder", name, (), {})
            if isinstance(value, Tensor)
            else value
            for name, value in self.arguments.items()
        }
        return lambda: _logits(root_fn(self.root, **given), self.num_classes), []

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._running or m not in (
            self.submodule_paths or ()
        ):  # a module that a forward makes for itself is part of its code
            return forward(*args, **kwargs)
        try:
            call = functools.partial(super().call_module, m, forward, args, kwargs)
            # A leaf runs with the generators kept, and to look at them costs as much as a tenth of the trace.
            return (
                call()
                if self.is_leaf_module(m, self.path_of_module(m))
                else self._without_chance(call)
            )
        except Exception:
            # A leaf that fails cannot be helped by becoming a leaf: the module around it may.
            qualname = self.path_of_module(m)
            if self.failed is None and not self.is_leaf_module(m, qualname) and not _only_holds(m):
                self.failed = qualname
            raise

    def _without_chance(self, call: Callable[[], Any]) -> Any:
        """Refuse code that draws random numbers outside of a traced operation: what it decides would be frozen into the graph."""
        before = _chance()
        value = call()
        if before != _chance():
            raise RuntimeError(
                "it draws random numbers that do not depend on its input, which a graph would freeze (or another thread drew some)"
            )
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._running:
            return attr_val
        if isinstance(attr_val, _PlantedFlag):
            return self.create_proxy("call_module", attr_val.target, (), {})
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if is_flag(obj.node):
            self.branched.add(str(obj.node.target).rpartition(".")[0])
        value = facts(obj.node).example
        if isinstance(value, Tensor):
            raise RuntimeError("a branch depends on the values of a tensor")
        if not _is_settled(obj.node):
            raise RuntimeError("a branch depends on the batch size, which a graph would freeze")
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = facts(obj.node).example
        return iter(
            [
                operator.getitem(obj, i)
                for i in range(_not_the_batch(len(value), isinstance(value, Tensor)))
            ]
        )

    def _run(self, node: fx.Node) -> Facts:
        args: Any = fx.node.map_arg(node.args, lambda n: facts(n).example)
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: facts(n).example)
        tensors = {
            arg: facts(arg).example
            for arg in node.all_input_nodes
            if isinstance(facts(arg).example, Tensor)
        }
        versions = {arg: tensor._version for arg, tensor in tensors.items()}
        buffers = self._buffers(node)
        cost, self._running = Cost(), True
        try:
            with (
                self.mode,
                _CountMacs(cost),
                noting_saved(cost.saved, self._alive, _is_parameter),
                torch.enable_grad(),
            ):
                value = self._value(node, args, kwargs)
        finally:
            self._running = False
        return Facts(
            example=value,
            of_batch=_is_of_batch(node, value),
            cost=cost,
            writes=tuple(
                arg for arg, tensor in tensors.items() if tensor._version != versions[arg]
            ),
            buffers=frozenset(
                name for name, state in self._buffers(node).items() if state != buffers.get(name)
            ),
        )

    def _buffers(self, node: fx.Node) -> dict[str, tuple[int, int]]:
        """Return the identity and the version of each buffer of the module that a node calls."""
        if node.op != "call_module" or is_flag(node):
            return {}
        return {
            name: (id(buffer), buffer._version)
            for name, buffer in self.root.get_submodule(str(node.target)).named_buffers()
        }

    def _value(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            return self.arguments[target]
        if node.op == "get_attr":
            value = _attribute(self.root, target)
            # Always the same twin of one constant, whose memory is told from that of others by it.
            return self.mode.from_tensor(value) if type(value) is Tensor else value
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if is_flag(node):
            return self.training
        with _chance_kept():
            try:
                return self.root.get_submodule(target)(*args, **kwargs)
            except DATA_DEPENDENT:
                return self._computed(target, args, kwargs)

    def _computed(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a leaf whose shapes depend on data for real, on ones, which are lengths and indices as well."""
        with unset_fake_temporarily(), torch.no_grad():
            module = copy.deepcopy(self.original.get_submodule(target))
            real_args, real_kwargs = tree_map_only(
                Tensor,
                lambda t: torch.ones(t.shape, dtype=t.dtype, device=t.device),
                (args, kwargs),
            )
            value = module(*real_args, **real_kwargs)
        learns = any(
            tensor.requires_grad
            for tensor in (*module.parameters(), *tree_leaves((args, kwargs)))
            if isinstance(tensor, Tensor)
        )
        fake = lambda t: self.mode.from_tensor(t.detach()).requires_grad_(learns and can_learn(t))  # noqa: E731
        return tree_map_only(Tensor, fake, value)


def _regime() -> tuple[bool, ...]:
    """Return the switches that a context manager in a forward may set."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
    )


def noting_saved(
    saved: dict[int, int], alive: list[UntypedStorage], is_given: Callable[[Tensor], bool]
) -> AbstractContextManager[Any]:
    """Return a context in which autograd keeps what it would, and that is noted: bytes by storage.

    Args:
        saved: to write to.
        alive: to append what is kept to, or the addresses of storages would be used again.
        is_given: tells tensors that are there anyway, such as parameters.
    """

    def note(tensor: Tensor) -> Tensor:
        if not is_given(tensor):
            alive.append(tensor.untyped_storage())
            saved[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an operation that keeps its own result would never be freed

    return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)


def can_learn(tensor: Tensor) -> bool:
    """Whether a tensor may have a gradient: floats, and the complex numbers of a Fourier transform between them."""
    return tensor.is_floating_point() or tensor.is_complex()


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


class _CountMacs(TorchDispatchMode):
    """Adds the multiply-adds of every operation to a cost, by the formulas of torch's own flop counter."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.cost.macs += formula(*args, **(kwargs or {}), out_val=result) // 2
        return result


def storage(tensor: Tensor) -> int:
    """Return a key of the tensor's storage; views of one tensor share it."""
    return tensor.untyped_storage()._cdata


def _only_holds(module: nn.Module) -> bool:
    """Whether a module is a container that has no code of its own."""
    return any(type(module).forward is kind.forward for kind in _CONTAINERS)


def is_layer(module: nn.Module) -> bool:
    """Whether a trace stops at `module`: it has no children, or is one of torch's own layers or a subclass of one."""
    if isinstance(module, _CONTAINERS):
        return False
    if not any(module.children()):
        return True
    return any(
        base.__module__.startswith(_LAYER_PACKAGES)
        for base in type(module).__mro__
        if base is not nn.Module
    )


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _keep_logits(graph: fx.Graph, root: nn.Module) -> None:
    """Reduce the graph's output to the logits and drop what only auxiliary outputs needed."""
    output = next(iter(reversed(graph.nodes)))
    logits = output.args[0]
    value = facts(logits).example if isinstance(logits, fx.Node) else logits
    if (
        not isinstance(value, Tensor)
        or value.ndim != 2
        or value.shape[0] != TRACE_BATCH
        or not value.is_floating_point()
    ):
        what = (
            f"a tensor of shape (B, {', '.join(map(str, value.shape[1:]))})"
            if isinstance(value, Tensor)
            else f"a {type(value).__name__}"
        )
        raise TraceError(
            f"{type(root).__name__} returns {what}, but logits are of shape (B, J). {way_out(root)}"
        )
    _order_hidden_reads(graph)
    needed = {writer for node in graph.nodes for writer in facts(node).after}
    graph.eliminate_dead_code(lambda node: node in needed or _has_effect(node))
    behind = {writer for node in graph.nodes for writer in facts(node).after}
    for node in graph.nodes:
        change_facts(node, read_behind=node in behind)


def _has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nothing reads it. Assertions go: what they say was settled when the model was traced."""
    if node.op in ("placeholder", "output"):
        return True
    writes_state = any(written.op in ("placeholder", "get_attr") for written in facts(node).writes)
    return writes_state or (
        node.op == "call_function" and node.target is not torch._assert and node.is_impure()
    )


def _order_hidden_reads(graph: fx.Graph) -> None:
    """Set `after` of each node that reads what an earlier node wrote in place without that node's being its argument."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    writers: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        read = [
            (arg, facts(arg).example)
            for arg in node.all_input_nodes
            if isinstance(facts(arg).example, Tensor)
        ]
        after = tuple(
            writer
            for arg, value in read
            for writer in _later(writers.get(storage(value), []), position[arg], position)
        )
        change_facts(node, after=after)
        for written in facts(node).writes:
            writers.setdefault(storage(facts(written).example), []).append(node)


def _later(nodes: list[fx.Node], place: int, position: dict[fx.Node, int]) -> list[fx.Node]:
    """Return those of the nodes, which are in order, that come after a place; a search, since a residual stream may be written for ever."""
    return nodes[bisect_right(nodes, place, key=position.__getitem__) :]


def _logits(value: Any, num_classes: int | None) -> Any:
    """Find the logits in what a forward returns.

    They are what it returns, or what is called so in a mapping or a record, or else the first of several values; but where several could
    be logits of different widths, the one with `num_classes` columns.

    Raises:
        TraceError: several could be, and `num_classes` does not say which.
    """
    if issubclass(type(value), fx.Proxy):
        return value
    if dataclasses.is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if "logits" in value:
            return _logits(value["logits"], num_classes)
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        return value
    if not value:
        return None
    widths = {i: _width(each) for i, each in enumerate(value) if _width(each)}
    if len(set(widths.values())) < 2:
        return _logits(value[0], num_classes)
    fitting = [i for i, width in widths.items() if width == num_classes]
    if not fitting:
        shapes = ", ".join(f"(B, {width})" for width in widths.values())
        raise TraceError(
            f"the model returns several values that could be its logits, of shapes {shapes}"
            f"{'' if num_classes is None else f', none with num_classes={num_classes}'}. Hint: pass num_classes, which tells which of them"
        )
    return value[fitting[0]]


def _width(value: Any) -> int:
    """Return n of a traced value that could be logits, a float tensor (B, n); 0 of others."""
    example = facts(value.node).example if issubclass(type(value), fx.Proxy) else None
    if (
        not isinstance(example, Tensor)
        or example.ndim != 2
        or len(example) != TRACE_BATCH
        or not example.is_floating_point()
    ):
        return 0
    return int(example.shape[1])


def _merge_modes(graph: fx.Graph, other: fx.Graph, branched: set[str]) -> bool:
    """Make a graph that was traced in train mode hold for eval mode as well, where that changes nothing or only numbers.

    A number that differs, as the dropout of `p if self.training else 0.0`, becomes a choice by the training flag of the one module
    that branched of those around it.

    Returns:
        Whether it was possible; if not, the graph is as it was.
    """
    pairs = list(zip(graph.nodes, other.nodes, strict=False))
    names = {there.name: here.name for here, there in pairs}
    changes = []
    for here, there in pairs:
        merged = _merged(here, there, names, branched)
        if merged is None:
            return False
        changes += [(here, merged)] if merged else []
    if len(graph.nodes) != len(other.nodes):
        return False
    for node, choices in changes:
        leaves, spec = tree_flatten((node.args, node.kwargs))
        for i, (owner, numbers) in choices.items():
            leaves[i] = _choice(node, owner, numbers)
        node.args, node.kwargs = tree_unflatten(leaves, spec)
    return True


def _merged(
    here: fx.Node, there: fx.Node, names: dict[str, str], branched: set[str]
) -> dict[int, tuple[str, tuple[Any, Any]]] | None:
    """Compare a node in train and in eval mode.

    Returns:
        For each argument that differs, by its place, the module that branched and its values in (eval, train) mode; None if they differ
        in more than numbers, or it is not clear which module's mode they go by.
    """
    if here.op != there.op or (here.op != "placeholder" and str(here.target) != str(there.target)):
        return None
    (ours, spec), (theirs, other_spec) = (
        tree_flatten((node.args, node.kwargs)) for node in (here, there)
    )
    if spec != other_spec:
        return None
    owners = [path for path, _ in here.meta.get("nn_module_stack", {}).values() if path in branched]
    choices: dict[int, tuple[str, tuple[Any, Any]]] = {}
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if _spelled(our, {}) == _spelled(their, names):
            continue
        if (
            len(owners) != 1
            or not isinstance(our, (int, float))
            or not isinstance(their, (int, float))
        ):
            return None
        choices[i] = (owners[0], (their, our))
    return choices


def _spelled(argument: Any, names: dict[str, str]) -> str:
    """Write an argument with the nodes in it by these names."""
    return str(fx.node.map_arg(argument, lambda node: names.get(node.name, node.name)))


def _choice(reader: fx.Node, owner: str, numbers: tuple[Any, Any]) -> fx.Node:
    """Insert before a node what reads the training flag of a module and picks a number by it."""
    graph = reader.graph
    with graph.inserting_before(reader):
        flag = graph.create_node("call_module", f"{owner}.{_FLAG}")
        picked = graph.create_node("call_function", operator.getitem, (numbers, flag))
    for node, example in ((flag, True), (picked, numbers[1])):
        node.meta = {"nn_module_stack": reader.meta.get("nn_module_stack", {})}
        set_facts(node, Facts(example))
    return picked


def _adopt(root: nn.Module, tracer: GuidedTracer, graph: fx.Graph) -> None:
    """Give `root` the constants and training flags that the graph names."""
    for node in graph.nodes:
        if (
            node.op == "get_attr"
            and node.target.startswith("_tensor_constant")
            and not hasattr(root, node.target)
        ):
            value = getattr(tracer.root, node.target)
            if isinstance(value, FakeTensor):
                raise TraceError(
                    f"{type(root).__name__} computes a constant, of shape {tuple(value.shape)}, from what has no values in a trace. "
                    "Hint: register the tensor that it is made of by self.register_buffer"
                )
            root.register_buffer(node.target, value, persistent=False)
        if is_flag(node):
            owner = root.get_submodule(node.target.rpartition(".")[0])
            owner.add_module(_FLAG, TrainingFlag().train(owner.training))


def _inputs(graph: fx.Graph, root: nn.Module) -> tuple[Input, ...]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(
        Input(
            node.target,
            tuple(value.shape[1:]),
            str(value.dtype).removeprefix("torch."),
            _high(node, root),
            _marks_tokens(node),
        )
        for node, value in ((node, facts(node).example) for node in placeholders)
    )


def _marks_tokens(node: fx.Node) -> bool:
    """Whether an input is what is called an attention mask everywhere, one for each token; a float one may be added to scores."""
    value = facts(node).example
    return node.target == "attention_mask" and value.ndim == 2 and not value.is_floating_point()


def _high(node: fx.Node, root: nn.Module) -> int:
    """Return the size of the embedding that reads an integer input, 2 where none does directly, 0 for float inputs."""
    if facts(node).example.is_floating_point():
        return 0
    readers = [
        root.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"
    ]
    return next(
        (reader.num_embeddings for reader in readers if isinstance(reader, nn.Embedding)), 2
    )


def _leaf_records(root: nn.Module, leaves: dict[str, str]) -> tuple[Leaf, ...]:
    total = max(sum(p.numel() for p in root.parameters()), 1)
    modules = {name: root.get_submodule(name) for name in leaves}
    return tuple(
        Leaf(
            name,
            type(modules[name]).__name__,
            leaves[name],
            sum(p.numel() for p in modules[name].parameters()) / total,
        )
        for name in outermost(modules)
    )


def _notes(root: nn.Module, graph: fx.Graph) -> Iterator[str]:
    called = [node.target for node in graph.nodes if node.op in ("call_module", "get_attr")]
    used = {id(p) for target in called for p in parameters_of(root, target).values()}
    if root._forward_hooks or root._forward_pre_hooks:
        yield "the hooks of the model itself are no part of the cut model; those of its layers are"
    idle = _idle(root, used)
    if idle:
        yield f"left out, since the logits do not depend on them: {in_brief(idle, 4)}"


def _idle(root: nn.Module, used: set[int]) -> list[str]:
    """Return the qualnames of the outermost modules none of whose parameters is in `used`, and of single unused parameters."""
    idle = [
        n
        for n, module in root.named_modules()
        if n and [*module.parameters()] and not {id(p) for p in module.parameters()} & used
    ]
    idle += [name for name, p in root.named_parameters() if id(p) not in used]
    return outermost(idle)


def outermost(qualnames: Iterable[str]) -> list[str]:
    """Return the qualnames that lie in no other of them, in their order."""
    known = dict.fromkeys(qualnames)
    return [name for name in known if not any(holder in known for holder in holders(name))]


def holders(qualname: str) -> Iterator[str]:
    """Yield the qualnames of the modules that hold one, innermost first, without the model itself."""
    while qualname := qualname.rpartition(".")[0]:
        yield qualname


def parameters_of(root: nn.Module, target: str) -> dict[str, nn.Parameter]:
    """Return the parameters that the target of a call_module or get_attr node holds, by qualname in `root`."""
    value = _attribute(root, target)
    if isinstance(value, nn.Parameter):
        return {target: value}
    if isinstance(value, nn.Module):
        return {f"{target}.{name}": p for name, p in value.named_parameters()}
    return {}
