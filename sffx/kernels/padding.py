"""Sums and means over the real tokens of a batch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def zero_padded(y: Tensor, real: Tensor) -> Tensor:
    """Return y, (B, T, C), with zeros where `real`, (B, T), is false."""
    return y.masked_fill(~real[:, :, None], 0)


def per_real_token(real: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor, (B, 1), that turns a mean over all tokens into one over the real ones.

    A sample without a real token counts as having one.
    """
    return real.shape[1] / real.sum(1, keepdim=True).clamp(min=1).to(dtype)


def windows(y: Tensor, size: int) -> Tensor:
    """Return, for each token of y, (B, T, C), what a convolution reads there: (B, T, C * size)."""
    return F.pad(y, (0, 0, size // 2, size // 2)).unfold(1, size, 1).flatten(2)
