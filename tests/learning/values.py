"""Outputs of blocks that heads are tested with."""

import torch
from torch import Tensor

# Shapes of one sample with 6 channels, and the axis of the channels in a batch.
LAYOUTS = {
    "B, C": ((6,), 1),
    "B, C, L": ((6, 9), 1),
    "B, C, H, W": ((6, 4, 5), 1),
    "B, C, 1, 1": ((6, 1, 1), 1),
    "B, C, T, H, W": ((6, 2, 3, 4), 1),
    "B, T, C": ((9, 6), 2),
    "B, H, W, C": ((4, 5, 6), 3),
}


def with_padding() -> tuple[Tensor, Tensor]:
    """Values (4, 7, 6) of tokens, with large ones at padding, and their mask, (4, 7).

    The padding is behind, before and between the real tokens; one sample has none.
    """
    y = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor(
        [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1]]
    )
    return torch.where(mask.bool()[:, :, None], y, 1e3).requires_grad_(), mask
