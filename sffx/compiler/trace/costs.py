"""What a node costs: the multiply-adds that it runs and the bytes that autograd keeps for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sffx.compiler.facts import Cost
from sffx.tensors import storage_key


class CountMacs(TorchDispatchMode):
    """Adds the multiply-adds of every operation to a cost, by the formulas of torch's counter.

    It also notes whether an operation draws random numbers.
    """

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.cost.draws = True
        packet = func._overloadpacket
        if packet in _RECURRENT:
            self.cost.macs += _macs_of_recurrent(args[0], args[1:3])
        elif packet in flop_registry:
            # torch counts a multiply-add as two operations.
            self.cost.macs += flop_registry[packet](*args, **named, out_val=result) // 2
        return result


# A recurrent layer as one operation, for which torch has no formula. Others are made of products.
_RECURRENT = (torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn)


def _macs_of_recurrent(x: Tensor, arguments: Sequence[Any]) -> int:
    """Return the multiply-adds of a recurrent layer: each step is multiplied by each weight.

    Args:
        x: of any shape, (..., C).
        arguments: those that hold the weights, two of them or a list of all with their biases.
    """
    weights = 0
    for value in tree_leaves(arguments):
        if isinstance(value, Tensor) and value.ndim == 2:  # a bias has one axis
            weights += value.numel()
    return x.numel() // x.shape[-1] * weights


def noting_saved(
    saved: dict[int, int], alive: list[UntypedStorage], given: Collection[int]
) -> AbstractContextManager[Any]:
    """Return a context that notes what autograd keeps for the backward pass, and keeps it.

    Args:
        saved: to write to: bytes by storage.
        alive: to append the storages to. Without it their addresses, which are the keys of
            `saved`, would be used again for other storages.
        given: the keys of the storages that are there anyway, as those of parameters are. What
            views them does not count, such as a transposed weight.
    """

    def note(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in given:
            note_kept(tensor, saved, alive)
        # An operation that keeps its own result would be in a cycle, and never freed.
        return tensor if tensor.is_leaf else tensor.detach()

    return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)


def note_kept(tensor: Tensor, saved: dict[int, int], alive: list[UntypedStorage]) -> None:
    """Note the storage of a tensor, as `noting_saved` does."""
    # A sparse tensor, as the edges of a graph, has no one storage.
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        alive.append(storage)
        saved[storage_key(tensor)] = storage.nbytes()
