"""Compare the time of several steps in one run.

The steps alternate, so anything that slows the machine slows all of them alike.
"""

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
Clock = Callable[[], float]


@dataclass(frozen=True)
class TimeComparison:
    """The times of all candidates. Frozen; prints as a table, with the ratios to the first one.

    Attributes:
        device: "cpu" or "cuda", the clock that was used.
        seconds: by candidate, one time for each round. Times of the same index were measured side
            by side.
    """

    device: str
    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Return the median time of a candidate, in seconds."""
        return statistics.median(self._times(name))

    def quartiles(self, name: str) -> tuple[float, float]:
        """Return the first and the third quartile of a candidate's times, in seconds."""
        first, _, third = statistics.quantiles(self._times(name), n=4, method="inclusive")
        return first, third

    def interquartile_range(self, name: str) -> float:
        """Return the spread of the middle half of a candidate's times, in seconds."""
        first, third = self.quartiles(name)
        return third - first

    def ratio(self, name: str, to: str) -> float:
        """Return the ratio of the medians."""
        return self.median(name) / self.median(to)

    def paired_ratio(self, name: str, to: str) -> float:
        """Return the median of the ratios within each round.

        On a noisy machine this is the ratio to trust, since neighbours in time share the noise.
        """
        pairs = zip(self._times(name), self._times(to), strict=True)
        return statistics.median(own / other for own, other in pairs)

    def __str__(self) -> str:
        names = list(self.seconds)
        first = names[0]
        width = max(len(name) for name in ["step", *names])
        lines = [
            f"{self.device}, {len(self.seconds[first])} rounds, ratios to {first!r}",
            f"{'step':<{width}}{'median ms':>12}{'IQR ms':>12}{'ratio':>10}{'paired':>10}",
        ]
        for name in names:
            median = self.median(name) * 1e3
            spread = self.interquartile_range(name) * 1e3
            ratio = self.ratio(name, first)
            paired = self.paired_ratio(name, first)
            lines.append(
                f"{name:<{width}}{median:>12.3f}{spread:>12.3f}{ratio:>10.3f}{paired:>10.3f}"
            )
        return "\n".join(lines)

    def _times(self, name: str) -> tuple[float, ...]:
        if name not in self.seconds:
            names = ", ".join(repr(each) for each in self.seconds)
            raise InputError(f"no step named {name!r} was timed. Hint: the names are {names}.")
        return self.seconds[name]


def compare_time(
    steps: Mapping[str, Step],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str | None = None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> TimeComparison:
    """Time several steps against each other, each once per round.

    The order changes from round to round. Two rounds at a time run a shuffled order and then its
    reverse. So a steady drift of the machine's speed hits all candidates alike, and none always
    follows the same neighbour. Garbage is collected between rounds, not during one.

    Args:
        steps: the candidates by name; the printed ratios are to the first.
        rounds: how often each is timed, at least 2. With an even number a drift cancels.
        warmup: how often each is run first, untimed.
        device: whose clock to use. "cpu" is the host's clock, "cuda" uses events on the current
            stream. None means CUDA if torch has initialised it in this process, else the CPU.
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
    measure = _time_on_cuda if kind == "cuda" else _host_stopwatch(clock)
    for _ in range(warmup):
        for step in steps.values():
            measure(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with _collector_off():
        gc.collect()
        for order in _orders(list(steps), rounds, seed):
            # Garbage of the last round is young. A full collection would look at all of torch,
            # which takes a fifth of a second each time.
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
            f"device {kind!r} has no clock here. "
            "Hint: use 'cpu' with steps that wait for their own results."
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device")
    return kind


def _host_stopwatch(clock: Clock) -> Stopwatch:
    def measure(step: Step) -> float:
        start = clock()
        step()
        return clock() - start

    return measure


def _time_on_cuda(step: Step) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    # Work that an earlier candidate left in the queue must not count for this one.
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


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
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
