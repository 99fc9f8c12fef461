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
        if mask is not None:
            return self._over_tokens(y, mask.bool()[:, :, None])
        if torch.onnx.is_in_onnx_export():
            return self._in_steps(y)
        last = y.movedim(1, -1)
        if torch.compiler.is_exporting() or y.is_contiguous() or not last.is_contiguous():
            return F.layer_norm(y, y.shape[1:], eps=self.eps)
        # No axis is told from another, so what is in the layout channels-last is normalised as it lies, and stays in it.
        return F.layer_norm(last, last.shape[1:], eps=self.eps).movedim(-1, 1)

    def _in_steps(self, y: Tensor) -> Tensor:
        """The same for an ONNX file: over as many values as an image's features have, ONNX Runtime's own layer norm loses digits."""
        centred = y - _mean(y)
        return centred * torch.rsqrt(_mean(centred.square()) + self.eps)

    def _over_tokens(self, y: Tensor, real: Tensor) -> Tensor:
        wide = (y if y.dtype.itemsize > 2 else y.float()).masked_fill(~real, 0)
        count = real.sum((1, 2), keepdim=True).clamp(min=1) * y.shape[2]
        centred = (wide - wide.sum((1, 2), keepdim=True) / count).masked_fill(~real, 0)
        variance = centred.square().sum((1, 2), keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _mean(y: Tensor) -> Tensor:
    """Return the mean of each sample, (B, 1, ...), one axis after the other: short sums are exact ones."""
    for axis in range(y.ndim - 1, 0, -1):
        y = y.mean(axis, keepdim=True)
    return y


NORMS: dict[str, type[nn.Module] | None] = {"layer": SampleNorm, "none": None}
