"""What oneDNN keeps inside an LSTM for the backward pass, which fake tensors leave out.

On a CPU it is 15 to 25 times the bytes of the layer's output. It depends on the version of oneDNN
and on the processor, so it is found by running the layer on a few samples.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# The run that finds the bytes has at most this many. oneDNN rounds to whole pages of memory, so a
# smaller run would give too many bytes for each sample.
_STEPS, _SAMPLES = 8, 16

_LSTM = torch.ops.aten.mkldnn_rnn_layer.default

# The places of its hidden and its cell state among its arguments.
_STATES = (5, 6)


class WithWorkspaces(TorchDispatchMode):
    """Gives an LSTM on fake tensors the workspace that oneDNN makes for real ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_kept = func is _LSTM and torch.is_grad_enabled()
        if not is_kept or not isinstance(args[0], FakeTensor):
            return result
        *outputs, workspace = result
        if workspace.numel():
            return result
        size = _workspace_bytes(args)
        return (*outputs, torch.empty(size, dtype=workspace.dtype, device=workspace.device))


class _Like(NamedTuple):
    """Stands for a tensor of a shape and a dtype. Unlike a tensor, equal ones have one hash."""

    shape: torch.Size
    dtype: torch.dtype


def _workspace_bytes(args: tuple[Any, ...]) -> int:
    """Return the bytes of the workspace for arguments of the operator.

    They are measured for fewer steps and samples. The bytes are in proportion to both.
    """
    steps, samples, features = args[0].shape
    few_steps = min(steps, _STEPS)
    few_samples = min(samples, _SAMPLES)
    smaller: list[Any] = []
    for place, value in enumerate(args):
        if not isinstance(value, Tensor):
            smaller.append(tuple(value) if isinstance(value, list) else value)
        elif place == 0:
            smaller.append(_Like(torch.Size([few_steps, few_samples, features]), value.dtype))
        elif place in _STATES:
            smaller.append(_Like(torch.Size([few_samples, value.shape[-1]]), value.dtype))
        else:
            smaller.append(_Like(value.shape, value.dtype))
    few_bytes = _measured(tuple(smaller))
    return few_bytes * (steps * samples) // (few_steps * few_samples)


@cache
def _measured(arguments: tuple[Any, ...]) -> int:
    """Return the bytes of the workspace where the operator runs on real tensors.

    Args:
        arguments: of the operator, with `_Like` in the place of each tensor.
    """
    args = []
    # Without the modes of the caller: one that counts memory would count this run as well.
    with _disable_current_modes(), torch.enable_grad():
        for each in arguments:
            is_tensor = isinstance(each, _Like)
            args.append(torch.zeros(each.shape, dtype=each.dtype) if is_tensor else each)
        workspace = _LSTM(*args)[3]
    return 0 if workspace is None else workspace.nbytes
