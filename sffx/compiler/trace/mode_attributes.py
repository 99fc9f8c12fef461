"""Attributes that a model sets when its mode is set, as `merged` of a layer with merged weights.

A graph would hold what they are in train mode. The modules that read them become leaves.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sffx.compiler.qualnames import OF_EVERY_MODULE
from sffx.compiler.trace.code_names import forward_of, functions_reached, names_in
from sffx.compiler.trace.leaves import add_leaves
from sffx.errors import TraceError
from sffx.net import overrides_mode

_PLAIN = (bool, int, float, str, type(None))


def make_leaves_by_mode(probe: nn.Module, leaves: dict[str, str]) -> None:
    """Make leaves of the modules whose forward reads an attribute that their mode sets.

    Args:
        probe: the model on fake tensors, in train mode; it is in train mode afterwards.
        leaves: the reasons why modules are leaves, by qualname; to write to.

    Raises:
        TraceError: the model itself is such a module.
    """
    if not any(overrides_mode(module) for module in probe.modules()):
        return
    for module, name in _set_by_mode(probe).items():
        reason = f"sets the attribute {name!r} by its mode"
        if module is probe:
            raise TraceError(
                f"{type(probe).__name__} {reason}, and its forward reads it, which a graph cannot "
                "hold. Hint: move this into a submodule, which then becomes a leaf"
            )
        add_leaves(leaves, probe, type(module), reason)


def _set_by_mode(probe: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that read an attribute which differs by the mode, and its name.

    The attribute is one of the module, or of a module inside.
    """
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
    found = {}
    for holder in probe.modules() if changed else ():
        inside = [changed[module] for module in holder.modules() if module in changed]
        read = set().union(*inside) & _names_read(type(holder)) if inside else set()
        if read:
            found[holder] = min(read)
    return found


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    attributes = {}
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE and type(value) in _PLAIN:
            attributes[name] = value
    return attributes


def _names_read(kind: type) -> set[str]:
    """Return the names in the forward of a class and of those it inherits, and in what they call.

    A forward may call that of a base class by `super()`, which no name tells.
    """
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for function in functions_reached(forward_of(base), kind):
            names.update(names_in(function.__code__))
    return names
