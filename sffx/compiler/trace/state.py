"""What a forward sets on the modules of a model: taken back for each attempt, or a counter."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (bool, int, float, str)
_CONTAINERS = (dict, list, set, deque)

# What every module has: its tensors and children, hooks and the like.
_OWN = frozenset(vars(nn.Module()))


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
    """Return the modules with a number that each call of the model changes, and its name.

    A number that has the same value after every call, as a size, is none.

    Args:
        probe: the model, whose forward has run once.
        run: runs it again.
        before: its attributes before it ran.
    """
    once = _numbers(probe)
    if once == before.numbers:
        return {}
    try:
        run()
    except Exception:
        return {}  # it has run before: what it lacks now, a trace will tell
    twice = _numbers(probe)
    found: dict[nn.Module, str] = {}
    for module, numbers in once.items():
        for name, value in numbers.items():
            if twice[module].get(name) != value:
                found[module] = name
    return found


def kept_tensors(probe: nn.Module, run: Callable[[], Any], before: Attributes) -> list[str]:
    """Return the qualnames of the tensors that a first call computes and later calls only read.

    Tables, which are computed from nothing that is fake, have values and are none.

    Args:
        probe: the model on fake tensors, whose forward has run.
        run: runs it again.
        before: its attributes before it ran.
    """
    made = _made(probe, before)
    if not made:
        return []
    try:
        with torch.no_grad():
            run()
    except Exception:
        return []
    again = _made(probe, before)
    return [name for name, value in made.items() if again.get(name) is value]


def _made(probe: nn.Module, before: Attributes) -> dict[str, FakeTensor]:
    """Return the fake tensors among the attributes that a forward has set, by qualname."""
    names = {module: name for name, module in probe.named_modules()}
    made = {}
    for module, attributes in before._before:
        for name, value in vars(module).items():
            if isinstance(value, FakeTensor) and attributes.get(name) is None:
                made[f"{names[module]}.{name}".strip(".")] = value
    return made


def _numbers(probe: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    return {module: _numbers_in(vars(module)) for module in probe.modules()}


def _numbers_in(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers among attributes, how many values a list has, and writes on tensors."""
    numbers = {}
    # The model's own buffers are fake. A trace sees what is written on them.
    for name, value in (*attributes.items(), *attributes.get("_buffers", {}).items()):
        if type(value) in _PLAIN:
            numbers[name] = value
        elif isinstance(value, _CONTAINERS) and name not in _OWN:
            numbers[name] = len(value)
        elif type(value) is Tensor:
            numbers[name] = value._version  # which counts the writes in place
    return numbers


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(module).items()}


def _copied(value: Any) -> Any:
    """Return a copy of a plain container, and everything else as it is."""
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value
