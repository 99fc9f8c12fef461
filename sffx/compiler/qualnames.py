"""Names: of modules and parameters, what holds what, and of what a node calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn
from torch.fx import Node


def name_of_target(target: Any) -> str:
    """Return the name of the method or function that a node calls, "" for what has none.

    Args:
        target: of the node. That of a module call is the module's qualname.
    """
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def name_of_call(node: Node, root: nn.Module) -> str:
    """Return the name of what a node calls: of a module's class, of a function or of a method.

    Args:
        node: the node.
        root: owns the modules that it calls.
    """
    module = called_module(node, root)
    return name_of_target(node.target) if module is None else type(module).__name__


def called_module(node: Node, root: nn.Module) -> nn.Module | None:
    """Return the module that a node calls, None for another kind of node.

    Args:
        node: the node.
        root: owns the module.
    """
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


# They read the shape of a tensor, and not its values.
_MAKE_VALUES = frozenset(
    (
        *("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like"),
        *("zeros_like", "new_empty", "new_full", "new_ones", "new_zeros"),
    )
)


def makes_values(target: Any) -> bool:
    """Return whether a node with a target makes new values, and reads a shape alone for them."""
    return name_of_target(target) in _MAKE_VALUES


def holders(qualname: str) -> Iterator[str]:
    """Yield the qualnames of the modules that hold one, innermost first, without the model."""
    parent = qualname.rpartition(".")[0]
    while parent:
        yield parent
        parent = parent.rpartition(".")[0]


def outermost(qualnames: Iterable[str]) -> list[str]:
    """Return the qualnames that lie in no other of them, in their order."""
    known = dict.fromkeys(qualnames)
    found = []
    for name in known:
        is_inside = any(holder in known for holder in holders(name))
        if not is_inside:
            found.append(name)
    return found


def without_numbers(qualname: str) -> str:
    """Return a qualname with a star for each number, as the layers of a stack have in common."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", qualname)


def in_common(qualnames: Iterable[str]) -> list[str]:
    """Return qualnames; of several that differ in numbers only, what they have in common."""
    groups: dict[str, list[str]] = {}
    for name in qualnames:
        groups.setdefault(without_numbers(name), []).append(name)
    return [common if len(names) > 1 else names[0] for common, names in groups.items()]


def has_tensors(module: nn.Module) -> bool:
    """Return whether a module or a part of it has a parameter or a buffer."""
    return any(True for _ in chain(module.parameters(), module.buffers()))


def attribute(root: nn.Module, target: str) -> Any:
    """Return what the target of a get_attr node names: a tensor or a module."""
    owner, _, name = target.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def parameters_of(root: nn.Module, target: str) -> dict[str, nn.Parameter]:
    """Return the parameters that the target of a node holds, by their qualname in `root`.

    Args:
        root: the traced model.
        target: of a call_module or get_attr node.
    """
    value = attribute(root, target)
    if isinstance(value, nn.Parameter):
        return {target: value}
    if isinstance(value, nn.Module):
        return {f"{target}.{name}": p for name, p in value.named_parameters()}
    return {}
