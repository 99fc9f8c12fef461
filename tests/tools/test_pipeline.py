"""How the rivals of the pipeline are divided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tools import pipeline
from tools.pipeline import MICROBATCHES, Workload


class Counted(nn.Module):
    """A layer that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.samples: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.samples.append(len(x))
        return self.weight * x


def test_an_optimizer_counts_once_for_all_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    class Noted(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            steps.append(len(unit.samples))

    monkeypatch.setattr(pipeline, "adamw", lambda parameters: Noted(parameters, lr=0.0))
    unit = Counted()
    (seconds,) = pipeline._seconds_of_units([unit], Workload("any", 4, batch=8))
    assert seconds > 0
    # Each step comes after as many passes as a schedule makes in a batch.
    assert steps == [MICROBATCHES * (i + 1) for i in range(len(steps))]
    assert set(unit.samples) == {8 // MICROBATCHES}
