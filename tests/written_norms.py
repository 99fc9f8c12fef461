"""Norms that models write by hand, as they are found in public code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Affine(nn.Module):
    """Scales and shifts channels.

    Args:
        channels: C.
        shape: of the scale and of the shift, with C in the place of -1.
    """

    def __init__(self, channels: int, shape: tuple[int, ...] = (1, -1, 1, 1)) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels).view(shape))
        self.shift = nn.Parameter(torch.zeros(channels).view(shape))


class OfChannels(_Affine):
    """Norms the channels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, (-1,))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred * torch.rsqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.scale[:, None, None] * x + self.shift[:, None, None]


class Turned(nn.Module):
    """Norms the channels of each place by torch's layer norm, for which they come last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.last = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OfBatch(_Affine):
    """A batch norm that assigns its statistics."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("var", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = x.var((0, 2, 3), unbiased=False, keepdim=True)
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach()
        return (x - mean) / torch.sqrt(var + 1e-5) * self.scale + self.shift


class FilterResponse(_Affine):
    """Filter response normalisation with its threshold (arXiv 1911.09737)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.threshold = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 1e-6)
        return torch.maximum(self.scale * x + self.shift, self.threshold)


class RootMeanSquare(_Affine):
    """Divides the channels of each place by their root mean square."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, (-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * self.scale


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised (arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Quantised(nn.Conv2d):
    """A convolution whose input and weight are rounded to learned steps (arXiv 1902.08153)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=padding)
        self.steps = nn.Parameter(torch.full((2,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = _rounded(x, self.steps[0])
        return F.conv2d(x, _rounded(self.weight, self.steps[1]), self.bias, 1, self.padding)


def _rounded(x: Tensor, step: Tensor) -> Tensor:
    """Return multiples of a step, with the gradient of what was rounded."""
    scaled = (x / step).clamp(-8, 7)
    return ((scaled.round() - scaled).detach() + scaled) * step


NORMS = (OfChannels, Turned, OfBatch, FilterResponse, RootMeanSquare)
CONVOLUTIONS = (nn.Conv2d, Standardised, Quantised)
