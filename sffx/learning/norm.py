"""The layer norm between blocks: keeps the length of a block's output, which carries the goodness, from the next block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SampleNorm(nn.Module):
    """Layer norm without parameters over all axes but the batch (section 4.2)."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, y: Tensor) -> Tensor:
        """Normalise each sample: (B, ...) to (B, ...)."""
        return F.layer_norm(y, y.shape[1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


NORMS: dict[str, type[nn.Module] | None] = {"layer": SampleNorm, "none": None}
