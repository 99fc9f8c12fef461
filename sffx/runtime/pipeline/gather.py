"""Bring the parts of all stages together on one process, for exports."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffx.net import CutModel
from sffx.runtime.gate import remove_open_gates
from sffx.runtime.groups import as_bytes
from sffx.runtime.pipeline.ownership import tensors_of
from sffx.runtime.pipeline.ranks import Ranks
from sffx.tensors import computed_tensors


def gathered_tensors(
    net: CutModel, parts: Sequence[Sequence[str]], destination: int, ranks: Ranks
) -> dict[int, Tensor]:
    """Return the tensors of all other stages by the id of their meta tensors.

    Other processes than the destination send theirs, and get nothing.

    Args:
        net: the cut model.
        parts: the names of the parts of each stage.
        destination: rank of the process that gets them.
        ranks: the processes.

    Raises:
        ProcessError: another process failed.
    """
    return ranks.watch.call(lambda: _gathered(net, parts, destination, ranks))


def _gathered(
    net: CutModel, parts: Sequence[Sequence[str]], destination: int, ranks: Ranks
) -> dict[int, Tensor]:
    received: dict[int, Tensor] = {}
    group = ranks.connections.everyone
    own = ranks.place.rank
    # Each process goes through the stages in the same order, so that sends and receives meet.
    for of_stage, holders in zip(parts, ranks.place.ranks, strict=True):
        if destination in holders:
            continue
        # All replicas of a stage have the same, so the first one sends.
        sender = holders[0]
        if own == destination:
            received.update(_receive_parts(net, of_stage, sender, group))
        elif own == sender:
            _send_parts(net, of_stage, destination, group)
    return received


def _send_parts(
    net: CutModel, parts: Sequence[str], destination: int, group: dist.ProcessGroup
) -> None:
    """Send the tensors of some parts to another process, one after the other."""
    for tensor in tensors_of(net, parts).values():
        dense = tensor.detach().cpu().contiguous()
        if dense.numel():
            dist.send(as_bytes(dense), destination, group)


def _receive_parts(
    net: CutModel, parts: Sequence[str], source: int, group: dist.ProcessGroup
) -> dict[int, Tensor]:
    """Return the tensors of some parts, which are meta tensors here, by the id of these.

    Args:
        net: the cut model, the same in both processes.
        parts: of the other process.
        source: rank of the other process.
        group: of both.
    """
    received: dict[int, Tensor] = {}
    for meta in tensors_of(net, parts).values():
        values = torch.empty(meta.shape, dtype=meta.dtype, device="cpu")
        if values.numel():
            dist.recv(as_bytes(values), source, group)
        if isinstance(meta, nn.Parameter):
            values = nn.Parameter(values, meta.requires_grad)
        received[id(meta)] = values
    return received


def with_tensors(net: CutModel, received: dict[int, Tensor]) -> CutModel:
    """Return a copy of a cut model on the CPU, with tensors in the place of meta tensors."""
    # deepcopy takes what the memo holds for the copy of a tensor, wherever the tensor is held.
    memo: dict[int, Any] = {**computed_tensors(net), **received}
    whole = copy.deepcopy(net, memo)
    # The parts that are no longer elsewhere run as any other.
    remove_open_gates(whole)
    whole.origin.model.to("cpu")
    return whole.to("cpu")


def beside_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the entries of a state dict that are no parameters and no buffers."""
    tensors = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name: entry for name, entry in module.state_dict().items() if name not in tensors}


def load_beside_tensors(whole: nn.Module, found: list[dict[str, Any]]) -> None:
    """Load the entries of all stages that are no parameters and no buffers."""
    state = whole.state_dict()
    for entries in found:
        state.update(entries)
    whole.load_state_dict(state)
