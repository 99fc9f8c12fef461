from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable

import pytest

from sffx.errors import InputError
from tools.timing import TimeComparison, compare_time


class FakeMachine:
    """A clock that moves only when a step runs; the log says which step ran, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def step(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds()

        return run


def test_constant_times_give_exact_medians_and_ratios() -> None:
    machine = FakeMachine()
    steps = {"slow": machine.step("slow", lambda: 4.0), "fast": machine.step("fast", lambda: 1.0)}
    result = compare_time(steps, rounds=4, device="cpu", clock=machine.clock)
    assert result.seconds == {"slow": (4.0,) * 4, "fast": (1.0,) * 4}
    assert (result.median("slow"), result.interquartile_range("slow")) == (4.0, 0.0)
    assert (result.ratio("slow", "fast"), result.ratio("fast", "slow")) == (4.0, 0.25)
    assert result.paired_ratio("slow", "fast") == 4.0


def test_warmup_runs_and_is_not_timed() -> None:
    machine = FakeMachine()
    first_calls = iter([100.0, 100.0, 100.0])
    steps = {"a": machine.step("a", lambda: next(first_calls, 1.0))}
    result = compare_time(steps, rounds=5, warmup=3, device="cpu", clock=machine.clock)
    assert len(machine.log) == 8
    assert result.seconds == {"a": (1.0,) * 5}


def test_every_round_runs_every_step_once_and_pairs_of_rounds_mirror_each_other() -> None:
    machine = FakeMachine()
    steps = {name: machine.step(name, lambda: 1.0) for name in "abcd"}
    compare_time(steps, rounds=6, warmup=0, device="cpu", clock=machine.clock)
    orders = ["".join(machine.log[i : i + 4]) for i in range(0, 24, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert [order[::-1] for order in orders[::2]] == orders[1::2]
    assert len(set(orders)) > 2


def test_the_seed_fixes_the_order() -> None:
    def order(seed: int) -> list[str]:
        machine = FakeMachine()
        steps = {name: machine.step(name, lambda: 1.0) for name in "abcd"}
        compare_time(steps, rounds=8, warmup=0, device="cpu", seed=seed, clock=machine.clock)
        return machine.log

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_a_steady_drift_cancels() -> None:
    # The machine gets slower by the same amount with every call. Over two rounds, equal steps must
    # come out equal to the last bit.
    machine = FakeMachine()

    def drifting() -> float:
        return 1.0 + len(machine.log)

    steps = {name: machine.step(name, drifting) for name in "abc"}
    result = compare_time(steps, rounds=2, warmup=0, device="cpu", clock=machine.clock)
    assert {sum(times) for times in result.seconds.values()} == {1.0 * 2 + 7}


def test_the_paired_ratio_survives_a_machine_that_changes_speed() -> None:
    # Rounds at speeds 1, 1, 1, 10, 10, with "a" always twice "b". In one round "b" alone is slowed.
    result = TimeComparison(
        "cpu", {"a": (2.0, 2.0, 2.0, 20.0, 20.0), "b": (1.0, 1.0, 30.0, 10.0, 10.0)}
    )
    assert result.paired_ratio("a", "b") == 2.0
    assert result.ratio("a", "b") == 0.2


def test_quartiles_are_those_of_the_sample() -> None:
    result = TimeComparison("cpu", {"a": (5.0, 1.0, 3.0, 2.0, 4.0)})
    assert result.quartiles("a") == (2.0, 4.0)
    assert result.interquartile_range("a") == 2.0


def test_it_prints_as_a_table() -> None:
    result = TimeComparison("cpu", {"backprop": (0.010, 0.010), "blockwise": (0.009, 0.009)})
    assert str(result).splitlines() == [
        "cpu, 2 rounds, ratios to 'backprop'",
        "step        median ms      IQR ms     ratio    paired",
        "backprop       10.000       0.000     1.000     1.000",
        "blockwise       9.000       0.000     0.900     0.900",
    ]


def test_the_random_states_and_the_collector_are_left_alone() -> None:
    before = random.getstate()
    collecting: list[bool] = []
    compare_time({"a": lambda: collecting.append(gc.isenabled())}, rounds=2, warmup=1, device="cpu")
    assert random.getstate() == before
    assert collecting == [True, False, False]
    assert gc.isenabled()


def test_the_collector_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        compare_time({"a": lambda: 1 / 0}, rounds=2, warmup=0, device="cpu")
    assert gc.isenabled()


def test_real_clock_orders_real_work() -> None:
    result = compare_time(
        {"long": lambda: sum(range(200_000)), "short": lambda: sum(range(2_000))},
        rounds=6,
        warmup=1,
    )
    assert result.device == "cpu"
    assert result.paired_ratio("long", "short") > 5
    assert Counter(len(times) for times in result.seconds.values()) == {6: 2}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="steps is empty"):
        compare_time({})
    with pytest.raises(InputError, match="rounds must be at least 2"):
        compare_time({"a": int}, rounds=1)
    with pytest.raises(InputError, match="device 'meta' has no clock"):
        compare_time({"a": int}, device="meta")
    with pytest.raises(InputError, match=r"no step named 'b' was timed\. Hint: the names are 'a'"):
        TimeComparison("cpu", {"a": (1.0, 1.0)}).ratio("a", to="b")
