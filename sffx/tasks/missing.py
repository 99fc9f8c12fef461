"""What the tasks share whose targets are floats: some of them may be missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sffx.checks import require_flag
from sffx.errors import InputError
from sffx.tasks.task import Task, has_values


@dataclass(frozen=True)
class MayLackTargets(Task):
    """A task whose targets are floats, of which some may be missing.

    Attributes:
        skip_nan: whether targets that are nan are left out of loss and metrics. Without it they are
            refused. A batch of nothing else has a loss of 0.
    """

    skip_nan: bool = False

    def __post_init__(self) -> None:
        require_flag("skip_nan", self.skip_nan)

    def is_counted(self, y: Tensor) -> Tensor:
        """Return which targets count, a tensor of bool in the shape of y."""
        return ~y.isnan() if self.skip_nan else torch.ones_like(y, dtype=torch.bool)

    def counted(self, values: Tensor, y: Tensor) -> Tensor:
        """Return the values whose targets count: flat, or as they are where all count."""
        return values[self.is_counted(y)] if self.skip_nan else values

    def require_counted(self, y: Tensor) -> None:
        """Raise an InputError if targets are nan, where the task does not leave them out."""
        if not self.skip_nan and has_values(y) and bool(y.isnan().any()):
            raise InputError(
                "y has values that are nan. Hint: if they are missing, "
                f"task=sffx.tasks.{type(self).__name__}(skip_nan=True) leaves them out"
            )


def mean_of_counted(values: Tensor, is_counted: Tensor) -> Tensor:
    """Return the mean of the values that count, 0 where none does. The others are finite."""
    total = torch.where(is_counted, values, 0).sum()
    return total / is_counted.sum().clamp(min=1)
