"""Samples made of two samples of a batch, as unsupervised Forward-Forward needs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError

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


def mixed(x: Tensor) -> Tensor:
    """Return images that are two images of a batch each, by a random mask, (B, C, H, W)."""
    masks = random_masks(len(x), x.shape[2], x.shape[3], x.device)
    return torch.where(masks, x, others_of(x))


def random_masks(samples: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return masks of large regions, bool (B, 1, H, W) (arXiv 2212.13345, section 3.2).

    Random bits are blurred with [1/4, 1/2, 1/4] in both directions, six times. The mask is where
    the result is above 0.5. At an edge its last value is repeated.
    """
    blurred = torch.randint(0, 2, (samples, 1, height, width), device=device).float()
    kernel = torch.tensor(BLUR, device=device)
    for _ in range(BLURS):
        padded = F.pad(blurred, (1, 1, 1, 1), mode="replicate")
        rows = F.conv2d(padded, kernel.reshape(1, 1, 3, 1))
        blurred = F.conv2d(rows, kernel.reshape(1, 1, 1, 3))
    return blurred > 0.5
