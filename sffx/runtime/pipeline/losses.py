"""The losses of an epoch so far."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class LossSums:
    """The losses of an epoch so far, each times its number of samples."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
        self.samples = 0

    def add(self, name: str, loss: Tensor, samples: int) -> None:
        """Add the mean loss of a batch."""
        # A tensor, since a number would make a GPU wait.
        self._sums[name] = self._sums[name] + loss.double() * samples

    def totals(self) -> dict[str, float]:
        """Return the sums by the block's name."""
        return {name: float(total) for name, total in self._sums.items()}
