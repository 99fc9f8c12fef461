"""Layers that keep a state from call to call, where another forward sets that state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from sffx.compiler.trace.state import Attributes
from sffx.tensors import OF_EVERY_MODULE


def set_outside(
    probe: nn.Module, run: Callable[[], Any], before: Attributes
) -> dict[nn.Module, str]:
    """Return the modules whose state is set while they do not run, and the name of the attribute.

    A spiking network resets its layers at each call. As a leaf of a graph, such a layer would keep
    its state from one call of the graph to the next, and so would a module that holds it. A state
    that is also an argument of the call does not count.

    Args:
        probe: the model on fake tensors, whose forward has run.
        run: runs it again.
        before: its attributes before it ran.
    """
    keeping = set()
    for module, attributes in before.of_modules():
        is_own = not any(module.children()) and not type(module).__module__.startswith("torch.")
        if is_own and _differences(_held_in(attributes), _held_in(vars(module))):
            keeping.add(module)
    if not keeping:
        return {}
    watch = _Watch(keeping)
    handles = []
    for module in probe.modules():
        if module is not probe and not keeping.isdisjoint(module.modules()):
            watch.note(module)
            handles.append(module.register_forward_pre_hook(watch.compare, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.note))
    try:
        run()
    except Exception:
        return {}  # it has run before: what it lacks now, a trace will tell
    finally:
        for handle in handles:
            handle.remove()
    return watch.found


class _Watch:
    """Compares the state in modules before each call with that after the call before it.

    Args:
        keeping: the layers that keep a state.

    Attributes:
        found: the modules where it is another one, and the name of an attribute.
    """

    def __init__(self, keeping: set[nn.Module]) -> None:
        self._keeping = keeping
        self._held: dict[nn.Module, dict[str, Any]] = {}
        self.found: dict[nn.Module, str] = {}

    def note(self, module: nn.Module, *_: Any) -> None:
        self._held[module] = self._state_in(module)

    def compare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        now = self._state_in(module)
        for name in _differences(self._held[module], now):
            if id(now.get(name)) not in given:
                self.found.setdefault(module, name.lstrip("."))

    def _state_in(self, module: nn.Module) -> dict[str, Any]:
        state = {}
        for qualname, part in module.named_modules():
            if part in self._keeping:
                for name, value in _held_in(vars(part)).items():
                    state[f"{qualname}.{name}"] = value
        return state


def _held_in(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the attributes of a module hold, and what lies in dictionaries and buffers."""
    held: dict[str, Any] = dict(attributes["_buffers"])
    for name, value in attributes.items():
        if name in OF_EVERY_MODULE:
            continue
        if isinstance(value, dict):
            held.update({f"{name}.{key}": part for key, part in value.items()})
        else:
            held[name] = value
    return held


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*before, *now])
    return [name for name in names if before.get(name) is not now.get(name)]
