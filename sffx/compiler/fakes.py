"""Fake twins of a module's parameters and buffers: shapes, dtypes and devices, no memory."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_tensors(module: nn.Module, mode: FakeTensorMode) -> dict[int, Tensor]:
    """Return fake twins by the `id` of what they stand for, as a memo for `copy.deepcopy`.

    Several times as fast as what `FakeCopyMode` does for each tensor. What is more than a plain tensor with a storage of its own (a
    subclass, a view, a tensor computed from others) is left out, and so to that mode.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if _is_plain(t)}
    owners = Counter(t.untyped_storage()._cdata for t in tensors.values())
    with mode:
        return {key: _twin(t) for key, t in tensors.items() if owners[t.untyped_storage()._cdata] == 1}


def _is_plain(t: Tensor) -> bool:
    if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided or t.is_quantized:
        return False
    return (type(t) is nn.Parameter or not t.requires_grad) and t.untyped_storage().nbytes() == t.nbytes


def _twin(t: Tensor) -> Tensor:
    twin = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return nn.Parameter(twin, t.requires_grad) if isinstance(t, nn.Parameter) else twin
