"""The layer norm between blocks: keeps the length of a block's output, which carries the goodness, from the next block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SampleNorm(nn.Module):
    """Layer norm without parameters over all axes but the batch (section 4.2); over real tokens only where a mask tells them."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise each sample: (B, ...) to (B, ...).

        Args:
            y: the output of a block.
            mask: (B, T) where y is (B, T, C), nonzero at real tokens. The others take no part in mean and variance, and become zero.
        """
        return F.layer_norm(y, y.shape[1:], eps=self.eps) if mask is None else self._over_tokens(y, mask.bool()[:, :, None])

    def _over_tokens(self, y: Tensor, real: Tensor) -> Tensor:
        wide = (y if y.dtype.itemsize > 2 else y.float()).masked_fill(~real, 0)
        count = real.sum((1, 2), keepdim=True).clamp(min=1) * y.shape[2]
        centred = (wide - wide.sum((1, 2), keepdim=True) / count).masked_fill(~real, 0)
        variance = centred.square().sum((1, 2), keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


NORMS: dict[str, type[nn.Module] | None] = {"layer": SampleNorm, "none": None}
