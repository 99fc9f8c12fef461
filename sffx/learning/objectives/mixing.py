"""Samples made of two samples of a batch, as unsupervised Forward-Forward needs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.kernels.precision import full_precision

# How often a mask is blurred, and the weights along each axis.
BLURS = 6
BLUR = (1 / 4, 1 / 2, 1 / 4)


def require_pairs(samples: int, objective: str) -> None:
    """Raise an InputError if a batch is too small to pair its samples.

    Args:
        samples: of the batch.
        objective: its name.
    """
    if samples < 2:
        raise InputError(
            f"the batch has {samples} sample, but the objective {objective!r} pairs samples of a "
            "batch. Hint: a batch size of 2 or more, and drop_last=True where one could be left"
        )


def others_of(x: Tensor) -> Tensor:
    """Return for each sample of a batch another one, (B, ...): that a random step further."""
    samples = len(x)
    step = torch.randint(1, samples, (1,), device=x.device)
    return x[(torch.arange(samples, device=x.device) + step) % samples]


def moved(x: Tensor, pixels: int) -> Tensor:
    """Return images that are moved by chance, each by itself, (B, C, H, W).

    Args:
        x: images, (B, C, H, W).
        pixels: by how many at most, up or down and to the left or right. Zeros come in.
    """
    samples, channels, height, width = x.shape
    device = x.device
    offsets = torch.randint(0, 2 * pixels + 1, (2, samples, 1), device=device)
    rows = torch.arange(height, device=device) + offsets[0]
    columns = torch.arange(width, device=device) + offsets[1]
    images = torch.arange(samples, device=device).reshape(-1, 1, 1, 1)
    planes = torch.arange(channels, device=device).reshape(1, -1, 1, 1)
    padded = F.pad(x, (pixels,) * 4)
    return padded[images, planes, rows[:, None, :, None], columns[:, None, None, :]]


def mixed(x: Tensor) -> Tensor:
    """Return images that are two images of a batch each, by a random mask, (B, C, H, W)."""
    masks = random_masks(len(x), x.shape[2], x.shape[3], x.device)
    return torch.where(masks, x, others_of(x))


def random_masks(samples: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return masks of large regions, bool (B, 1, H, W) (arXiv 2212.13345, section 3.2).

    Random bits are blurred with [1/4, 1/2, 1/4] in both directions, six times. The mask is where
    the result is above 0.5. At an edge its last value is repeated.
    """
    bits = torch.randint(0, 2, (samples, 1, height, width), device=device).float()
    # In half precision a sum of bits would be rounded, and some would lie on the other side of 0.5.
    with full_precision(bits):
        blurred = _blur(height, device) @ bits @ _blur(width, device).T
    return blurred > 0.5


def _blur(size: int, device: torch.device) -> Tensor:
    """Return the matrix that blurs a column of a mask to its end, (size, size)."""
    places = torch.arange(size, device=device)
    # As the bits are, whatever the default dtype is.
    once = torch.zeros(size, size, device=device, dtype=torch.float32)
    for offset, weight in zip((-1, 0, 1), BLUR, strict=True):
        neighbours = (places + offset).clamp(0, size - 1)
        once[places, neighbours] += weight
    return torch.linalg.matrix_power(once, BLURS)
