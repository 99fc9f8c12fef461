"""Fake twins of a module's parameters and buffers: shapes, dtypes and devices, no memory."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

M = TypeVar("M", bound=nn.Module)


def fake_copy(module: M, mode: FakeTensorMode) -> M:
    """Return a copy of a module with fake twins of its tensors."""
    with FakeCopyMode(mode):
        return copy.deepcopy(module, fake_tensors(module, mode))


def fake_copy_but_constants(module: M, mode: FakeTensorMode) -> M:
    """Return a copy of a module with fake twins of its parameters and buffers, and real copies of tensors that are plain attributes.

    What a forward computes from these alone is a constant of the graph, and must have values.
    """
    memo: dict[int, Any] = dict(fake_tensors(module, mode))
    with FakeCopyMode(mode):
        copy.deepcopy([*module.parameters(), *module.buffers()], memo)  # the others, into the memo
    return copy.deepcopy(module, memo)


def fake_tensors(module: nn.Module, mode: FakeTensorMode) -> dict[int, Tensor]:
    """Return fake twins by the `id` of what they stand for, as a memo for `copy.deepcopy`.

    Many times as fast as what `FakeCopyMode` does for each tensor, since nothing is dispatched. What is more than a plain tensor with a
    storage of its own (a subclass, a view, a tensor computed from others) is left out, and so to that mode.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if _is_plain(t)}
    owners = Counter(t.untyped_storage()._cdata for t in tensors.values())
    return {
        key: _twin(t, mode) for key, t in tensors.items() if owners[t.untyped_storage()._cdata] == 1
    }


def _is_plain(t: Tensor) -> bool:
    if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.is_quantized:
        return False
    return (
        type(t) is nn.Parameter or not t.requires_grad
    ) and t.untyped_storage().nbytes() == t.nbytes


def _twin(t: Tensor, mode: FakeTensorMode) -> Tensor:
    twin = FakeTensor(
        mode, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), t.device
    )
    if isinstance(t, nn.Parameter):
        twin.requires_grad_(t.requires_grad)
        twin._is_param = True  # how torch marks a parameter of a tensor subclass
    return twin
