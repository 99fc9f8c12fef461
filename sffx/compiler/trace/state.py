"""What a forward sets on the modules of a model: taken back for each attempt, or a counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str)
_CONTAINERS = (dict, list, set)


class Attributes:
    """The attributes of all modules of a model before its forward ran.

    What a forward sets on a module, `self.window = x.shape[1]`, may be a proxy of the attempt's
    graph. The next attempt must not read it.
    """

    def __init__(self, probe: nn.Module) -> None:
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in probe.modules():
            self._before.append((module, _attributes(module)))

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
    if once == {module: _numbers_in(attributes) for module, attributes in before._before}:
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


def _numbers(probe: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    return {module: _numbers_in(vars(module)) for module in probe.modules()}


def _numbers_in(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if type(value) in _PLAIN}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(module).items()}


def _copied(value: Any) -> Any:
    """Return a copy of a plain container, and everything else as it is."""
    return value.copy() if type(value) in _CONTAINERS else value
