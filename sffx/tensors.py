"""Questions about a tensor or a module, and copies, that several rooms of the package ask for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sffx.errors import InputError

M = TypeVar("M", bound=nn.Module)

# The attributes that every module has: its mode, its hooks, the dicts of its tensors and children.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# What to do about a model with tensors on the meta device.
WITHOUT_VALUES = (
    "Hint: load the weights first, net.to_empty(device='cpu') and net.load_state_dict; a net whose "
    "blocks a Pipeline has divided comes back whole by pipe.gather()"
)


def shapes_of_floats(values: Any) -> list[torch.Size]:
    """Return the shapes of the float tensors among values, which may be nested."""
    tensors = [each for each in tree_leaves(values) if isinstance(each, Tensor)]
    return [each.shape for each in tensors if each.is_floating_point()]


def require_one_size(name: str, value: Any) -> None:
    """Raise an InputError if a value is a nested tensor, whose samples have sizes of their own."""
    if isinstance(value, Tensor) and value.is_nested:
        raise InputError(
            f"{name} is a nested tensor, whose samples have sizes of their own. "
            f"Hint: pad it, torch.nested.to_padded_tensor({name}, value)"
        )


def name_on_meta(module: nn.Module) -> str:
    """Return the name of a parameter or buffer on the meta device, "" if there is none."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            return name
    return ""


def modules_in(module: nn.Module) -> list[nn.Module]:
    """Return what `module.modules()` yields, in a fifth of the time: training steps ask for it."""
    # By identity: the class of a module may compare by content, or have no hash at all.
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in found:
            continue
        found[id(part)] = part
        children = part._modules
        if children:
            # The first child is looked at next.
            waiting.extend(reversed(children.values()))
    return list(found.values())


def require_identity(module: nn.Module) -> None:
    """Raise an InputError if a module, or one of its parts, is not hashed by its identity.

    torch itself keeps modules in sets. So `parameters()`, `train()` and `to()` fail for a module
    that has no hash, and leave out all but one of several that are equal.
    """
    for part in modules_in(module):
        kind = type(part).__name__
        if type(part).__hash__ is None:
            what = "has no hash, since its class defines __eq__ alone or sets __hash__ to None"
        elif _is_hashed_by_identity(part):
            continue
        else:
            what = "is hashed by its content, so that torch takes two equal modules for one"
        raise InputError(
            f"the module {kind} {what}. Hint: write __hash__ = torch.nn.Module.__hash__ into the "
            f"class {kind}, or eq=False where it is a dataclass"
        )


def _is_hashed_by_identity(module: nn.Module) -> bool:
    try:
        return hash(module) in (object.__hash__(module), hash(id(module)))
    except Exception:
        return False  # it hashes an attribute that has no hash, such as a list


def storage_key(tensor: Tensor) -> int:
    """Return a key of a tensor's storage, which the views of one tensor share.

    The key is an address. torch uses it again after the storage is freed, so whoever keeps a key
    keeps the storage alive as well. A sparse tensor has no one storage, and is its own key.
    """
    if tensor.layout is not torch.strided:
        return tensor._cdata
    return tensor.untyped_storage()._cdata


def as_dense(tensor: Tensor) -> Tensor:
    """Return a tensor with a value for each index; a sparse one has no equality and no masks."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def can_learn(tensor: Tensor) -> bool:
    """Whether a tensor may have a gradient: floats and complex numbers may."""
    return tensor.is_floating_point() or tensor.is_complex()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, however deep."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf


def holds_tensor(value: Any) -> bool:
    """Return whether a value is a tensor or holds one."""
    return next(tensors_in(value), None) is not None


def differ(one: Any, other: Any) -> bool:
    """Return whether two plain values differ. Tensors in them are compared as objects."""
    if one is other:
        return False
    if holds_tensor(one) or holds_tensor(other):
        return True
    return bool(one != other)


def without_arrays(value: Any) -> Any:
    """Return a value with a tensor for each array of numpy in it, however deep.

    An array that no tensor can hold, such as one of strings, stays as it is.
    """
    return tree_map_only(np.ndarray, _as_tensor, value)


def _as_tensor(array: np.ndarray[Any, Any]) -> Any:
    try:
        # A copy, since torch takes neither a read-only array nor one that runs backwards.
        return torch.from_numpy(np.array(array))
    except TypeError:
        return array


def copied(module: M) -> M:
    """Return a deep copy of a module, also of one that keeps tensors computed from parameters.

    Such a tensor is the `weight` that the old `torch.nn.utils.weight_norm` and `spectral_norm` and
    pruning compute before each forward. Its copy has the value and no gradient history.
    """
    twin = copy.deepcopy(module, computed_tensors(module))
    detach_scripts(twin)
    return twin


def detach_scripts(module: nn.Module) -> None:
    """Make the parameters of scripted modules learn, in a copy of a module.

    torch copies these as values that are computed from the original's, which then would learn.
    """
    for part in module.modules():
        if not isinstance(part, torch.jit.ScriptModule):
            continue
        for parameter in part.parameters():
            if not parameter.is_leaf:
                parameter.detach_().requires_grad_()


def computed_tensors(module: nn.Module) -> dict[int, Any]:
    """Return copies of the tensors that torch's own deepcopy refuses, as a memo for it."""
    return {id(tensor): tensor.detach().clone() for tensor in find_computed(module)}


def find_computed(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module keeps and that have a gradient history."""
    values = tree_leaves([list(part.__dict__.values()) for part in module.modules()])
    return [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
