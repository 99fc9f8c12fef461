"""The head of a block that reads instances: frames of a clip, images of a bag, windows."""

from __future__ import annotations

from torch import Tensor, nn


class InstanceMean(nn.Module):
    """The mean, over the instances of a sample, of the goodness that a head gives each of them.

    Args:
        head: of single instances.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, y: Tensor) -> Tensor:
        """Return the goodness (B, J) of a block's output (B, N, ...), of N instances a sample."""
        goodness = self.head(y.flatten(0, 1))
        return goodness.unflatten(0, y.shape[:2]).mean(1)
