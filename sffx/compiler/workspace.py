"""What oneDNN keeps inside an LSTM for the backward pass, which fake tensors leave out.

On a CPU it is 15 to 25 times the bytes of the layer's output. It depends on the version of oneDNN
and on the processor, so it is found by running the layer on a few samples.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# The run that finds the bytes has at most these. oneDNN rounds to whole pages of memory, so with
# fewer they would be too many.
_STEPS, _SAMPLES = 8, 16

_LSTM = torch.ops.aten.mkldnn_rnn_layer.default

# The places of its two states among its arguments: hidden and cell.
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


def _workspace_bytes(args: tuple[Any, ...]) -> int:
    """Return the bytes for the operator's arguments. They grow with the steps and the samples."""
    steps, samples, features = args[0].shape
    few_steps, few_samples = min(steps, _STEPS), min(samples, _SAMPLES)
    smaller: list[Any] = []
    for place, value in enumerate(args):
        if not isinstance(value, Tensor):
            smaller.append(tuple(value) if isinstance(value, list) else value)
        elif place == 0:
            smaller.append((torch.Size([few_steps, few_samples, features]), value.dtype))
        elif place in _STATES:
            smaller.append((torch.Size([few_samples, value.shape[-1]]), value.dtype))
        else:
            smaller.append((value.shape, value.dtype))
    return _measured(tuple(smaller)) * (steps * samples) // (few_steps * few_samples)


@cache
def _measured(arguments: tuple[Any, ...]) -> int:
    """Return the bytes of the workspace where the operator runs on real tensors.

    Args:
        arguments: of the operator, with a shape and a dtype in the place of each tensor.
    """
    args = []
    # Whoever counts memory counts the layer, not this.
    with _disable_current_modes(), torch.enable_grad():
        for each in arguments:
            if isinstance(each, tuple) and each and isinstance(each[0], torch.Size):
                args.append(torch.zeros(each[0], dtype=each[1]))
            else:
                args.append(each)
        workspace = _LSTM(*args)[3]
    return 0 if workspace is None else workspace.nbytes
