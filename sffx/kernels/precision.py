"""Sums over many values are computed in float32 or wider, whatever autocast and the model say."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def widened(y: Tensor) -> Tensor:
    """Return a value of 16 bits in float32, any other as it is."""
    return y if y.dtype.itemsize > 2 else y.float()


def full_precision(y: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, for computing on the device of y."""
    device = y.device.type
    # A tensor on "meta" has no autocast to switch off, and an exported graph cannot hold a switch.
    if device == "meta" or torch.compiler.is_exporting():
        return nullcontext()
    # Asking is faster than switching.
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
