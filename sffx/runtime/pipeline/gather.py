"""Bring the parts of all stages together on one process, for exports."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffx.net import CutModel
from sffx.runtime.pipeline.message import as_bytes
from sffx.runtime.pipeline.ownership import tensors_of
from sffx.tensors import computed_tensors


def send_parts(
    net: CutModel, parts: Sequence[str], destination: int, group: dist.ProcessGroup
) -> None:
    """Send the tensors of some parts to another process, one after the other."""
    for tensor in tensors_of(net, parts).values():
        dense = tensor.detach().cpu().contiguous()
        if dense.numel():
            dist.send(as_bytes(dense), destination, group)


def receive_parts(
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
        values = torch.empty(meta.shape, dtype=meta.dtype)
        if values.numel():
            dist.recv(as_bytes(values), source, group)
        is_parameter = isinstance(meta, nn.Parameter)
        received[id(meta)] = nn.Parameter(values, meta.requires_grad) if is_parameter else values
    return received


def with_tensors(net: CutModel, received: dict[int, Tensor]) -> CutModel:
    """Return a copy of a cut model on the CPU, with tensors in the place of meta tensors."""
    # deepcopy takes what the memo holds for the copy of a tensor, wherever the tensor is held.
    memo: dict[int, Any] = {**computed_tensors(net), **received}
    whole = copy.deepcopy(net, memo)
    whole.origin.model.to("cpu")
    return whole.to("cpu")
