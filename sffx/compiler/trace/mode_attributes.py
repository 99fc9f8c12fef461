"""Attributes that a module sets in its own `train()`, as `merged` of a layer with merged weights.

A graph would hold their values in train mode. So the modules whose forward reads them are leaves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sffx.compiler.trace.code_names import forward_of, functions_reached, names_in
from sffx.compiler.trace.leaves import add_leaves_of_modules
from sffx.net import overrides_mode
from sffx.tensors import OF_EVERY_MODULE

_PLAIN = (bool, int, float, str, type(None))


def make_leaves_by_mode(probe: nn.Module, leaves: dict[str, str]) -> None:
    """Make leaves of the modules whose forward reads an attribute that a mode sets.

    Args:
        probe: the model on fake tensors, in train mode; it is in train mode afterwards.
        leaves: the reasons why modules are leaves, by qualname; to write to.

    Raises:
        TraceError: the model itself is such a module.
    """
    if not any(overrides_mode(module) for module in probe.modules()):
        return
    found = {}
    for module, name in _readers(probe).items():
        found[module] = f"reads the attribute {name!r}, which its mode sets"
    add_leaves_of_modules(leaves, probe, found)


def _readers(probe: nn.Module) -> dict[nn.Module, str]:
    """Return the modules whose forward reads an attribute that a mode sets, and its name.

    The attribute is one of the module, or of a module inside.
    """
    changed = _set_by_mode(probe)
    found: dict[nn.Module, str] = {}
    if not changed:
        return found
    for holder in probe.modules():
        of_parts: set[str] = set()
        for part in holder.modules():
            of_parts |= changed.get(part, set())
        if not of_parts:
            continue
        read = of_parts & _names_read(type(holder))
        if read:
            found[holder] = min(read)
    return found


def _set_by_mode(probe: nn.Module) -> dict[nn.Module, set[str]]:
    """Return the names of the attributes that differ between train and eval mode, by module."""
    in_training = {module: _plain_attributes(module) for module in probe.modules()}
    probe.eval()
    in_eval = {module: _plain_attributes(module) for module in probe.modules()}
    probe.train()
    changed = {}
    for module, before in in_training.items():
        after = in_eval.get(module, before)
        names = {name for name in {**before, **after} if before.get(name) != after.get(name)}
        if names:
            changed[module] = names
    return changed


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, texts and flags among the attributes of a module's own, by name."""
    attributes = {}
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE and type(value) in _PLAIN:
            attributes[name] = value
    return attributes


def _names_read(kind: type) -> set[str]:
    """Return the names in the forward of a class, in those of its bases, and in what these call.

    A forward may call that of a base by `super()`, where no name shows which one it calls.
    """
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for function in functions_reached(forward_of(base), kind):
            names.update(names_in(function.__code__))
    return names
