"""Packed sequences, as of `pack_padded_sequence`: batches of sequences without their padding.

How many steps a pack has follows from the lengths, which are data. Fake tensors have no data. There
each sequence has the full length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from sffx.compiler.facts import facts
from sffx.errors import ExportError
from sffx.tensors import tensors_in

# What the functions of `torch.nn.utils.rnn` call in the end.
_PACK = torch._VF._pack_padded_sequence
_PAD = torch._VF._pad_packed_sequence


def pack_padded(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Return the steps of sequences, (N, ...), and how many sequences have each step, (T,)."""
    if not isinstance(x, FakeTensor):
        packed: tuple[Tensor, Tensor] = _eagerly(_PACK, x, lengths, batch_first)
        return packed
    _require_no_export()
    by_step = x.transpose(0, 1) if batch_first else x
    steps, batch = by_step.shape[:2]
    # With values, which a recurrent layer of torch reads to know the batch of each step.
    with unset_fake_temporarily():
        sizes = torch.full((int(steps),), int(batch))
    return by_step.flatten(0, 1), sizes


def pad_packed(
    steps: Tensor, sizes: Tensor, batch_first: bool, padding: float, length: int
) -> tuple[Tensor, Tensor]:
    """Return the sequences of a pack, padded to the longest one, and their lengths."""
    if not isinstance(steps, FakeTensor):
        padded: tuple[Tensor, Tensor] = _eagerly(_PAD, steps, sizes, batch_first, padding, length)
        return padded
    _require_no_export()
    by_step = steps.unflatten(0, (len(sizes), -1))
    lengths = torch.full((by_step.shape[1],), len(sizes))
    return by_step.transpose(0, 1) if batch_first else by_step, lengths


def packing_target(target: Any) -> Any:
    """Return what a graph calls in the place of a function that packs or pads sequences."""
    return _TARGETS.get(target, target) if callable(target) else target


_TARGETS: dict[Callable[..., Any], Callable[..., Any]] = {_PACK: pack_padded, _PAD: pad_packed}


def longest_packed(lengths: fx.Node) -> int:
    """Return the most steps of the sequences whose lengths an input gives, 0 for other inputs.

    Args:
        lengths: the placeholder.
    """
    passed = {lengths}
    ahead = [lengths]
    while ahead:
        node = ahead.pop()
        for reader in node.users:
            if reader.target is pack_padded and reader.args[1] is node:
                _, sizes = facts(reader).example
                return len(sizes)
            if reader not in passed and _holds_integers(facts(reader).example):
                ahead.append(reader)
                passed.add(reader)
    return 0


def _holds_integers(value: Any) -> bool:
    tensors = list(tensors_in(value))
    return bool(tensors) and not any(each.is_floating_point() for each in tensors)


def _eagerly(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function that `torch.compile` would run on fake tensors of its own, and so fail."""
    # Unless something is compiled nobody has imported dynamo, which takes a second.
    if "torch._dynamo" in sys.modules:
        call = torch.compiler.disable(call)
    return call(*args)


def _require_no_export() -> None:
    """Raise an ExportError if an exporter runs, whose fake tensors have no lengths either."""
    if torch.compiler.is_exporting():
        raise ExportError(
            "torch.nn.utils.rnn.pack_padded_sequence has no form in an exported file, since its "
            "shapes depend on the lengths. Hint: sffx.extract(net) gives the plain model back; a "
            "model that runs its recurrent layer on padded sequences can be exported"
        )
