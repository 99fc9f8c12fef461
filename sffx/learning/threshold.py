"""Goodness as a logit: a threshold for each label."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Threshold(nn.Module):
    """`s[n, j] = g[n, j] - theta_j`: goodness above the threshold says that the label is there.

    A goodness that is a mean of squares is never negative, so its sigmoid alone is one half at
    least. Forward-Forward compares goodness with a threshold in the same way (Hinton, arXiv
    2212.13345). There it is fixed; here it is learned, for each label.

    Args:
        goodness: the head that computes the goodness, (B, J) or (B, J, ...) of positions.
        num_labels: J.
        start: the first value of each threshold.

    Attributes:
        threshold: theta, (J,).
    """

    def __init__(self, goodness: nn.Module, num_labels: int, start: float) -> None:
        super().__init__()
        self.goodness = goodness
        self.threshold = nn.Parameter(torch.full((num_labels,), start))

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scores of a block's output, as large as the goodness.

        Args:
            y: the output of a block.
            mask: as for the head that computes the goodness.
        """
        goodness = self.goodness(y) if mask is None else self.goodness(y, mask)
        of_positions = [1] * (goodness.ndim - 2)
        return goodness - self.threshold.to(goodness.dtype).reshape(-1, *of_positions)
