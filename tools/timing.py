"""Compare the time of several steps in one run, so that what slows the machine slows all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sffx.errors import InputError

Step = Callable[[], object]
Stopwatch = Callable[[Step], float]


@dataclass(frozen=True)
class TimeComparison:
    """What each candidate took. Frozen; prints as a table, with the ratios to the first candidate.

    Attributes:
        device: "cpu" or "cuda", which clock was used.
        seconds: of every candidate, one time per round; entries of the same index were measured side by side.
    """

    device: str
    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """The median time of a candidate, in seconds."""
        return statistics.median(self._of(name))

    def quartiles(self, name: str) -> tuple[float, float]:
        """The first and the third quartile of a candidate's times, in seconds."""
        first, _, third = statistics.quantiles(self._of(name), n=4, method="inclusive")
        return first, third

    def interquartile_range(self, name: str) -> float:
        """The spread of the middle half of a candidate's times, in seconds."""
        first, third = self.quartiles(name)
        return third - first

    def ratio(self, name: str, to: str) -> float:
        """The ratio of the medians."""
        return self.median(name) / self.median(to)

    def paired_ratio(self, name: str, to: str) -> float:
        """The median of the ratios within each round; the one to trust on a noisy machine, since neighbours in time share the noise."""
        return statistics.median(
            own / other for own, other in zip(self._of(name), self._of(to), strict=True)
        )

    def __str__(self) -> str:
        first = next(iter(self.seconds))
        width = max(len("step"), *map(len, self.seconds))
        rounds = len(self.seconds[first])
        lines = [f"{self.device}, {rounds} rounds, ratios to {first!r}"]
        lines.append(f"{'step':<{width}}{'median ms':>12}{'IQR ms':>12}{'ratio':>10}{'paired':>10}")
        for name in self.seconds:
            times = f"{self.median(name) * 1e3:>12.3f}{self.interquartile_range(name) * 1e3:>12.3f}"
            lines.append(
                f"{name:<{width}}{times}{self.ratio(name, first):>10.3f}{self.paired_ratio(name, first):>10.3f}"
            )
        return "\n".join(lines)

    def _of(self, name: str) -> tuple[float, ...]:
        if name not in self.seconds:
            raise InputError(
                f"no step named {name!r} was timed. Hint: the names are {', '.join(map(repr, self.seconds))}."
            )
        return self.seconds[name]


def compare_time(
    steps: Mapping[str, Step],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> TimeComparison:
    """Time several steps against each other, each once per round, in an order that changes from round to round.

    Two rounds at a time run one shuffled order and then its reverse: a steady drift of the machine's speed hits all candidates alike,
    and none always follows the same neighbour. Garbage is collected between rounds and not during one.

    Args:
        steps: the candidates by name; the printed ratios are to the first.
        rounds: how often each is timed, at least 2; an even number lets a drift cancel.
        warmup: how often each is run first, untimed.
        device: whose clock to use: the host's for "cpu", events on the current stream for "cuda". None means CUDA if torch has
            initialised it in this process, else the CPU.
        seed: of the shuffles; torch's own random state is left alone.
        clock: returns seconds; used for "cpu" only.

    Returns:
        The times of every candidate in every round.

    Raises:
        InputError: there is nothing to time, too few rounds, or no clock for the device.
    """
    if not steps:
        raise InputError("there is no step to time: steps is empty")
    if rounds < 2 or warmup < 0:
        raise InputError(
            f"rounds must be at least 2 and warmup at least 0, not {rounds} and {warmup}"
        )
    kind = _device_type(device)
    measure = _stopwatch(kind, clock)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warmup):
        for step in steps.values():
            measure(step)
    with _collector_off():
        gc.collect()
        for order in _orders(list(steps), rounds, seed):
            # What the round before made is young; a full collection looks at all of torch, a fifth of a second each time.
            gc.collect(1)
            for name in order:
                seconds[name].append(measure(steps[name]))
    return TimeComparison(kind, {name: tuple(times) for name, times in seconds.items()})


def _device_type(device: torch.device | str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_initialized() else "cpu"
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise InputError(
            f"device {kind!r} has no clock here. Hint: use 'cpu' with steps that wait for their own results."
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device")
    return kind


def _stopwatch(kind: str, clock: Callable[[], float]) -> Stopwatch:
    def on_host(step: Step) -> float:
        start = clock()
        step()
        return clock() - start

    def on_cuda(step: Step) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Work that an earlier candidate left in the queue must not count for this one.
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_cuda if kind == "cuda" else on_host


def _orders(names: list[str], rounds: int, seed: int) -> Iterator[list[str]]:
    """Yield one order per round: a shuffle, its reverse, another shuffle, its reverse, ..."""
    generator = random.Random(seed)
    order = list(names)
    for index in range(rounds):
        if index % 2 == 0:
            generator.shuffle(order)
            yield list(order)
        else:
            yield order[::-1]


@contextmanager
def _collector_off() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
