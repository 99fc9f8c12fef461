"""Different tensors of a model that share memory: views, and weights tied by `.data`.

`copy.deepcopy` gives each parameter memory of its own, so in a copy it is shared no longer. Buffers
go on to share theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sffx.tensors import OF_EVERY_MODULE, storage_key, tensors_in


class _Range(NamedTuple):
    """Where a tensor lies in memory: the key of its storage, and the numbers in [start, stop)."""

    storage: int
    start: int
    stop: int


def notes_on_shared_memory(model: nn.Module) -> Iterator[str]:
    """Yield the notes on parameters that share memory, which they do not in a copy."""
    ranges: list[tuple[str, _Range]] = []
    for name, parameter in model.named_parameters():
        own = _range(parameter)
        if own is not None and _repeats(parameter):
            yield (
                f"the numbers of {name} share memory with each other: in the cut model each is a "
                "number of its own"
            )
        elif own is not None:
            ranges.append((name, own))
    num_parameters = len(ranges)
    for name, tensor in (*model.named_buffers(), *_attributes(model)):
        own = _range(tensor)
        if own is not None:
            ranges.append((name, own))
    for name, other in _overlapping(ranges, num_parameters):
        yield (
            f"{name} and {other} share memory, which a copy of a model does not keep: in "
            "the cut model each has its own. Hint: to share a parameter, let both be one, "
            "b.weight = a.weight"
        )


def _overlapping(
    ranges: list[tuple[str, _Range]], num_parameters: int
) -> Iterator[tuple[str, str]]:
    """Yield the names of each pair of tensors that share memory, and of which one is a parameter.

    Two buffers share memory in a copy as well.

    Args:
        ranges: of all tensors by name, those of parameters first.
        num_parameters: how many these are.
    """
    # A large model has thousands of tensors, and hardly any two share a storage.
    by_storage: dict[int, list[int]] = {}
    for place, (_, own) in enumerate(ranges):
        by_storage.setdefault(own.storage, []).append(place)
    for i, (name, own) in enumerate(ranges[:num_parameters]):
        for place in by_storage[own.storage]:
            other, its = ranges[place]
            # Each pair once.
            if place > i and _overlap(own, its):
                yield name, other


def views_in_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in plain attributes that share memory with a parameter or a buffer.

    Returns:
        The tensors, by the qualname of the attribute.
    """
    ids: set[int] = set()
    storages: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        ids.add(id(tensor))
        own = _range(tensor)
        if own is not None:
            storages.add(own.storage)
    found = {}
    for name, tensor in _attributes(model):
        own = _range(tensor)
        if own is not None and own.storage in storages and id(tensor) not in ids:
            found[name] = tensor
    return found


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in plain attributes, each with the attribute's qualname.

    Modules with hooks before their forward are passed over: a hook may compute the attribute anew
    in each call, as that of a spectral norm does.
    """
    for qualname, module in model.named_modules():
        if module._forward_pre_hooks:
            continue
        for name, value in vars(module).items():
            if name in OF_EVERY_MODULE:
                continue
            for tensor in tensors_in(value):
                if not isinstance(tensor, nn.Parameter):
                    yield f"{qualname}.{name}".strip("."), tensor


def _range(tensor: Tensor) -> _Range | None:
    """Return where a tensor lies in memory, None where it is empty or not laid out by strides."""
    is_plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not is_plain or tensor.layout is not torch.strided or not tensor.numel():
        return None
    start = int(tensor.storage_offset())
    last = start
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * step
    return _Range(storage_key(tensor), start, last + 1)


def _repeats(tensor: Tensor) -> bool:
    """Return whether several elements of a tensor are one number in memory, as after `expand`."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and step == 0 for size, step in pairs)


def _overlap(one: _Range, two: _Range) -> bool:
    if one.storage != two.storage:
        return False
    return one.start < two.stop and two.start < one.stop
