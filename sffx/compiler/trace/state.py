"""What a forward sets on the modules of a model: taken back for each attempt, or a counter."""

from __future__ import annotations

import array
import copy
import dis
import functools
import random
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Number
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sffx.compiler.trace.code_names import forward_of, functions_reached, values_named
from sffx.tensors import OF_EVERY_MODULE

_PLAIN = (bool, int, float, str)
_CONTAINERS = (dict, list, set, deque)


class Attributes:
    """The attributes of all modules of a model before its forward ran.

    What a forward sets on a module, `self.window = x.shape[1]`, may be a proxy of the attempt's
    graph. The next attempt must not read it.

    Attributes:
        numbers: of each module, as `counters` compares them.
    """

    def __init__(self, probe: nn.Module) -> None:
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in probe.modules():
            self._before.append((module, _attributes(module)))
        self.numbers = _numbers(probe)

    def of_modules(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Return each module with its attributes before the forward ran."""
        return self._before

    def buffers_of(self, module: nn.Module) -> Mapping[str, Any]:
        """Return the buffers that a module had."""
        for each, before in self._before:
            if each is module:
                return before["_buffers"]
        return {}

    def restore(self) -> None:
        for module, before in self._before:
            for name in list(vars(module)):
                # fx keeps constants on the model, for the graph that reads them.
                if name not in before and not name.startswith("_tensor_constant"):
                    del module.__dict__[name]
            # Copies again, or the attempt would write to what is from before.
            module.__dict__.update({name: _copied(value) for name, value in before.items()})


def counters(probe: nn.Module, run: Callable[[], Any], before: Attributes) -> dict[nn.Module, str]:
    """Return the modules with a number that each call of the model changes, and what it is called.

    A number that has the same value after every call, as a size, is none.

    Args:
        probe: the model, whose forward has run once.
        run: runs it again.
        before: its attributes before it ran.
    """
    once = _numbers(probe)
    found = {} if once == before.numbers else _changed(probe, run, once)
    kinds = {type(module) for module in probe.modules()}
    if any(map(_may_count_by_mode, kinds)):
        with suppress(Exception), in_mode(probe, False):  # what eval mode lacks, a trace will tell
            run()
            found |= _changed(probe, run, _numbers(probe))
    return found


def _changed(
    probe: nn.Module, run: Callable[[], Any], before: Mapping[nn.Module, dict[str, Any]]
) -> dict[nn.Module, str]:
    """Return the modules with a number that a call changes, and what it is called.

    Args:
        probe: the model.
        run: runs it.
        before: the numbers of each module.
    """
    try:
        run()
    except Exception:
        return {}  # it has run before: what it lacks now, a trace will tell
    after = _numbers(probe)
    found: dict[nn.Module, str] = {}
    for module, numbers in before.items():
        for name, value in numbers.items():
            if after[module].get(name) != value:
                found[module] = name
    return found


@contextmanager
def in_mode(probe: nn.Module, training: bool) -> Iterator[None]:
    """Put all modules into a mode for a while, not by `train`, which may be overridden."""
    modes = {module: module.training for module in probe.modules()}
    for module in modes:
        module.training = training
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _may_count_by_mode(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class reads its mode, and sets something."""
    if kind.__module__.partition(".")[0] == "torch":
        return False
    codes = [function.__code__ for function in functions_reached(forward_of(kind), kind)]
    return any("training" in code.co_names for code in codes) and any(map(_sets, codes))


@functools.lru_cache(maxsize=1000)
def _sets(code: CodeType) -> bool:
    return any(step.opname in _SETTING for step in dis.get_instructions(code))


_SETTING = ("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL")


def set_once(probe: nn.Module, before: Attributes) -> dict[nn.Module, str]:
    """Return the modules with a number that the first call sets, and what it is called.

    Args:
        probe: the model, whose forward has run.
        before: its attributes before it ran.
    """
    found: dict[nn.Module, str] = {}
    for module, attributes in before.of_modules():
        for name, value in vars(module).items():
            if type(value) not in _PLAIN or name in OF_EVERY_MODULE:
                continue
            if name not in attributes or attributes[name] != value:
                found[module] = name
    return found


@dataclass(frozen=True)
class Kept:
    """What later calls read of an earlier one.

    Attributes:
        once: qualnames of the tensors that the first call computes, and later calls only read.
        carried: the modules with a tensor that each call computes and the next one reads, and what
            it is called.
    """

    once: tuple[str, ...] = ()
    carried: Mapping[nn.Module, str] = field(default_factory=dict)


def kept_tensors(probe: nn.Module, run: Callable[[], Any], before: Attributes) -> Kept:
    """Return what a call keeps for the next one, in attributes and the containers there.

    A table, such as one of positions, is computed from no fake tensor, so it has values. It does
    not count, unless each call replaces it by other values.

    Args:
        probe: the model on fake tensors, whose forward has run.
        run: runs it again.
        before: its attributes before it ran.
    """
    made = _tensors_made(probe, before)
    if not made:
        return Kept()
    reads = Reads(made)
    try:
        with reads:
            run()
    except Exception:
        return Kept()  # it has run before: what it lacks now, a trace will tell
    earlier = _by_place(made)
    later = _by_place(_tensors_made(probe, before))
    names = {module: name for name, module in probe.named_modules()}
    once = []
    carried = {}
    for key in reads.found:
        tensor, place = made[key]
        module, name = place
        if not _are_same(earlier[place], later.get(place, [])):
            carried[module] = _as_attribute(name)
        elif isinstance(tensor, FakeTensor):
            once.append(f"{names[module]}.{name}".strip("."))
    return Kept(tuple(dict.fromkeys(once)), carried)


def _are_same(earlier: list[Tensor], later: list[Tensor]) -> bool:
    """Return whether tensors are the same, or have the same values; fake ones have none."""
    if len(earlier) != len(later):
        return False
    for one, other in zip(earlier, later, strict=True):
        if one is other:
            continue
        is_fake = isinstance(one, FakeTensor) or isinstance(other, FakeTensor)
        if is_fake or one.shape != other.shape or not torch.equal(one, other):
            return False
    return True


# The module and the attribute that hold a tensor.
_Place = tuple[nn.Module, str]
# By the `id` of a tensor: the tensor, and where it lies.
_Made = dict[int, tuple[Tensor, _Place]]


def _by_place(made: _Made) -> dict[_Place, list[Tensor]]:
    found: dict[_Place, list[Tensor]] = {}
    for tensor, place in made.values():
        found.setdefault(place, []).append(tensor)
    return found


def _tensors_made(probe: nn.Module, before: Attributes) -> _Made:
    """Return the tensors that a forward has put into attributes."""
    known = {id(tensor) for tensor in (*probe.parameters(), *probe.buffers())}
    made: _Made = {}
    for module, attributes in before.of_modules():
        for name, value in vars(module).items():
            if name in OF_EVERY_MODULE:
                continue
            earlier = {id(leaf) for leaf in tree_leaves(attributes.get(name))}
            for leaf in _leaves(value):
                is_new = id(leaf) not in known and id(leaf) not in earlier
                if isinstance(leaf, Tensor) and is_new:
                    made[id(leaf)] = (leaf, (module, name))
    return made


def _leaves(value: Any) -> list[Any]:
    return tree_leaves(list(value) if isinstance(value, (deque, set)) else value)


# Functions that do not read the numbers in a tensor.
_NO_READS = ("__get__", "size", "dim", "__deepcopy__")


class Reads(TorchFunctionMode):
    """Notes which of some tensors torch's functions are given.

    Args:
        made: the `id` of each of the tensors.

    Attributes:
        found: the `id` of each that a function was given, in order.
    """

    def __init__(self, made: Container[int]) -> None:
        super().__init__()
        self._made = made
        self.found: dict[int, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _NO_READS:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._made:
                    self.found[id(leaf)] = None
        return func(*args, **(kwargs or {}))


def _numbers(probe: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """Return what `counters` compares: of each module, by what it is called."""
    known: dict[int, Any] = {}
    shared: dict[type, dict[str, Any]] = {}
    numbers = {}
    for module in probe.modules():
        # A forward may register buffers, which have values. Those of the model itself are fake, and
        # have no numbers: a trace sees what is written on them.
        own = {}
        for name, value in {**module._buffers, **vars(module)}.items():
            if name not in OF_EVERY_MODULE and not name.startswith("__"):
                own[_as_attribute(name)] = _counted(value, known)
        kind = type(module)
        if kind not in shared:
            shared[kind] = _numbers_of_class(kind, known)
        numbers[module] = {**shared[kind], **own}
    return numbers


def _numbers_of_class(kind: type, known: dict[int, Any]) -> dict[str, Any]:
    """Return the numbers in attributes of a class, and in the globals that its methods name."""
    numbers: dict[str, Any] = {}
    methods = []
    for base in reversed(kind.__mro__):  # a class overrides what its bases have
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(base).items():
            if name.startswith("__"):
                continue
            numbers[_as_attribute(name)] = _counted(value, known)
            if isinstance(value, FunctionType):
                methods.append(value)
    for function in functions_reached(methods, kind):
        for name, value in values_named(function):
            if isinstance(value, (*_ATOMS, *_CONTAINERS, *_BYTES, *_STATES, Tensor)):
                numbers[f"the global {name!r}"] = _counted(value, known)
    return numbers


def _as_attribute(name: str) -> str:
    return f"its attribute {name!r}"


def _counted(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """Return the numbers in a value, however deep: how long lists are, and how far iterators.

    Args:
        value: an attribute, or what it holds.
        known: results by the `id` of objects, since many modules share one configuration.
        depth: of the value in the attribute.
    """
    if isinstance(value, _ATOMS):
        return value if value == value else repr(value)  # nan differs from itself
    if type(value) is Tensor:
        return value._version  # which counts the writes in place
    if depth == _DEEPEST or isinstance(value, (nn.Module, type)):
        return None
    if id(value) not in known:
        known[id(value)] = None  # it may hold itself
        known[id(value)] = _counted_inside(value, known, depth)
    return known[id(value)]


def _counted_inside(value: Any, known: dict[int, Any], depth: int) -> Any:
    if isinstance(value, _BYTES):
        return value.tobytes() if isinstance(value, np.ndarray) else bytes(value)
    if isinstance(value, tuple(_STATES)):
        kind = next(kind for kind in _STATES if isinstance(value, kind))
        return repr(_STATES[kind](value))
    if isinstance(value, Iterator):
        with suppress(Exception):  # a generator does not say how far it is
            return repr(value.__reduce__())
        return None
    parts = list(_parts_of(value))
    return len(parts), [_counted(part, known, depth + 1) for part in parts[:_MOST_PARTS]]


def _parts_of(value: Any) -> Iterator[Any]:
    """Yield what a container, a function or another object holds."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (*_CONTAINERS, tuple)):
        yield from value
    elif isinstance(value, FunctionType):  # `def forward(self, x, calls=[0])`
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # the cell of a name that has not been set is empty
                yield cell.cell_contents
    elif type(value).__module__.partition(".")[0] != "torch":
        yield from getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(value, name, None)


# Classes of numbers and texts.
_ATOMS = (Number, str, bytes, np.generic)

# Classes that hold numbers in memory of their own.
_BYTES = (bytearray, array.array, np.ndarray)

# By the class of a generator of random numbers: what tells how many it has drawn.
_STATES: dict[type, Callable[[Any], Any]] = {
    random.Random: lambda generator: generator.getstate(),
    np.random.Generator: lambda generator: generator.bit_generator.state,
    np.random.RandomState: lambda generator: generator.get_state(),
}

# How deep a value is looked into, and at how many parts of it, so that a large one takes no time.
_DEEPEST = 3
_MOST_PARTS = 100


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(module).items()}


def _copied(value: Any) -> Any:
    """Return a copy of a plain container, and everything else as it is."""
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value
