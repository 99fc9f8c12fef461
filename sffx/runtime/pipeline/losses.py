"""The losses of an epoch: the sums of one process, and the means over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sffx.errors import InputError


@dataclass(frozen=True)
class Report:
    """What a process tells the others at the end of an epoch.

    Attributes:
        losses: of its blocks by name, each the sum over its samples.
        samples: how many these are.
        busy: the share of the epoch in which it did not wait, between 0 and 1.
    """

    losses: dict[str, float]
    samples: int
    busy: float


class LossSums:
    """The losses of an epoch so far, each times its number of samples."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sums: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
        self.samples = 0

    def add(self, name: str, loss: Tensor, samples: int) -> None:
        """Add the mean loss of a batch. That of no samples is no number, and counts nothing."""
        if samples:
            # A tensor, since a number would make a GPU wait.
            self._sums[name] = self._sums[name] + loss.double() * samples

    def report(self, busy: float) -> Report:
        """Return the sums.

        Args:
            busy: as the report has it.
        """
        losses = {name: float(total) for name, total in self._sums.items()}
        return Report(losses, self.samples, busy)


def mean_losses(reports: Sequence[Report]) -> dict[str, float]:
    """Return the mean loss of each block over the samples of all its replicas, by name.

    Args:
        reports: of all processes, those of the first stage first.

    Raises:
        InputError: there are no samples.
    """
    # The replicas of a stage report the same blocks, and other stages report others.
    totals: dict[str, float] = {}
    samples: dict[str, int] = {}
    for report in reports:
        for name, total in report.losses.items():
            totals[name] = totals.get(name, 0.0) + total
            samples[name] = samples.get(name, 0) + report.samples
    # With training data, each block has seen a sample in one of its replicas.
    if not all(samples.values()):
        raise InputError("the loader yielded no samples. Hint: pass data to train on")
    return {name: total / samples[name] for name, total in totals.items()}
