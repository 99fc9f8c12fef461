"""Containers in the arguments of a call: lists, tuples, mappings and dataclasses, however deep."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# The keys and indices that lead to a value in an argument, behind the argument's name.
Path: TypeAlias = tuple[Any, ...]

# How deep the attributes of an argument are searched for tensors.
_DEEPEST = 6
# How deep a structure may be. Python ends a recursion at about 1,000 calls.
_DEEPEST_STRUCTURE = 100


@dataclass(frozen=True)
class Slot:
    """The place of one input.

    Attributes:
        name: of the input.
    """

    name: str


def mapped(value: Any, change: Callable[[Any, Path], Any], path: Path) -> Any:
    """Return a copy of a structure with each value in it that is no container changed.

    For example, `mapped([x, {"mask": m}], change, ("images",))` calls `change(x, ("images", 0))`
    and `change(m, ("images", 1, "mask"))`.

    Args:
        value: a list, a tuple, a mapping or a dataclass, however deep; or what is to change.
        change: takes a value and its path.
        path: of `value`.
    """
    if isinstance(value, Slot) or _is_opaque(value):
        return change(value, path)
    parts = parts_of(value)
    if parts is None:
        return change(value, path)
    changed = {key: mapped(part, change, (*path, key)) for key, part in parts.items()}
    return rebuilt(value, changed)


def holds_itself(value: Any) -> bool:
    """Return whether a list, a tuple or a mapping holds itself, at any depth.

    What goes through all values of a structure would never end there.
    """
    return _is_among(value, ())


def _is_among(value: Any, outer: tuple[int, ...]) -> bool:
    """Return whether a structure holds itself, or one of those around it, which have some ids."""
    if not isinstance(value, (list, tuple, Mapping)):
        return False
    if id(value) in outer or len(outer) > _DEEPEST_STRUCTURE:
        return True
    parts = value.values() if isinstance(value, Mapping) else value
    return any(_is_among(part, (*outer, id(value))) for part in parts)


def values_in(value: Any, path: Path) -> list[tuple[Path, Any]]:
    """Return what `mapped` would change in a structure, with the paths, in order."""
    found: list[tuple[Path, Any]] = []

    def note(part: Any, path_of_part: Path) -> Any:
        found.append((path_of_part, part))
        return part

    mapped(value, note, path)
    return found


def parts_of(value: Any) -> dict[Any, Any] | None:
    """Return what a container holds by key, index or field; None for other values."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))  # of a named tuple
        return dict(zip(names, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def rebuilt(value: Any, parts: dict[Any, Any]) -> Any:
    """Return a container like another one, that holds other parts."""
    if type(value) is dict:
        return parts
    if isinstance(value, (tuple, list)):
        kind: Any = type(value)
        if hasattr(value, "_fields"):  # a named tuple takes its fields one by one
            return kind(*parts.values())
        return kind(parts.values())
    # A copy of the container, since its class may take anything to make one.
    new = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, Mapping):
            new[key] = part
        else:
            object.__setattr__(new, key, part)  # of a frozen dataclass as well
    return new


def _is_opaque(value: Any) -> bool:
    """Whether a container is a constant as a whole, or is refused as a whole."""
    return isinstance(value, PackedSequence) or not holds_data(value)


def holds_data(value: Any, depth: int = 0) -> bool:
    """Return whether a tensor, an array or a slot is in a value.

    It may be an item, however deep, or an attribute of an object.
    """
    if isinstance(value, (Tensor, Slot, np.ndarray)):
        return True
    # An object may refer to itself.
    if depth == _DEEPEST:
        return False
    parts = parts_of(value)
    if parts is not None:
        held = list(parts.values())
    elif isinstance(value, (set, frozenset)):
        held = list(value)
    else:
        held = list(getattr(value, "__dict__", {}).values())
    return any(holds_data(part, depth + 1) for part in held)


def holds_slot(value: Any) -> bool:
    """Return whether an input lies in a part of an argument."""
    if isinstance(value, Slot):
        return True
    parts = parts_of(value) or {}
    return any(holds_slot(part) for part in parts.values())


def as_code(path: Path) -> str:
    """Write a path as Python code, "images['left'][0]"."""
    name, *keys = path
    return name + "".join(f"[{key!r}]" for key in keys)


def form_in_words(value: Any) -> str:
    """Write what kind of container a value is, and what it holds."""
    parts = parts_of(value)
    kind = type(value).__name__
    if parts is None:
        return f"a {kind}"
    if isinstance(value, (tuple, list)):
        return f"a {kind} of {len(parts)}"
    return f"a {kind} of {', '.join(map(repr, parts))}"
