"""The cost of a training step of several methods, relative to one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from sffx.memory.count import count_memory
from tools.timing import Clock, compare_time


@dataclass(frozen=True)
class Training:
    """A model with its optimizer and its loss: all that a training step needs.

    Attributes:
        model: in train mode.
        optimizer: over its parameters.
        loss: of a batch, a scalar.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def relative_costs(
    trainings: Mapping[str, Training],
    to: str,
    *,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Measure a training step of each method. This trains the models.

    Memory is counted in steps that have the optimizer's state in place. It is that of the larger of
    two steps, since a method may do something else on every second one. Times are of steps that
    alternate.

    Args:
        trainings: the methods by name.
        to: the name of the method that all others are divided by.
        rounds: of the time measurement, as for `compare_time`.
        clock: as for `compare_time`.

    Returns:
        By method, the "time" of a step, its "peak" memory and its "activations", all relative, and
        its "peak_bytes".
    """
    counts = {}
    for name, training in trainings.items():
        training.step()  # the optimizer's state exists from here on
        two_steps = []
        for _ in range(2):
            count = count_memory(training.step, model=training.model, optimizer=training.optimizer)
            two_steps.append(count)
        counts[name] = max(two_steps, key=lambda count: count.peak)
    steps = {name: training.step for name, training in trainings.items()}
    times = compare_time(steps, rounds=rounds, clock=clock)
    costs = {}
    for name, count in counts.items():
        costs[name] = {
            "time": times.paired_ratio(name, to),
            "peak": count.peak / counts[to].peak,
            "activations": count.activations / counts[to].activations,
            "peak_bytes": count.peak,
        }
    return costs
