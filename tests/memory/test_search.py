"""The search for blocks within a budget, on made-up costs; the oracle tries all ways to cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffx.memory.costs import START, Owned, Span
from sffx.memory.footprint import UPDATE
from sffx.memory.search import Search

PLACES = [0, 1, 2, 3]


class MadeUp:
    """Costs that are numbers: what a block takes while it runs, and what its counts find later.

    A lower bound is half of what a block takes.
    """

    def __init__(self, running: dict[Span, int], heads: list[int], trainable: list[int]) -> None:
        self.places = PLACES
        self.true_running = running
        self.counts: dict[Span, int] = {}
        self.model = Owned(everything=7, trainable=sum(trainable), largest=max(trainable), count=4)
        self.input_bytes = 5
        self.heads = {}
        for place, size in zip(PLACES[:-1], heads, strict=True):
            self.heads[place] = Owned(everything=size, trainable=size, largest=size, count=1)
        self.trainable_of_step = trainable
        self.bounds: dict[int, dict[Span, int]] = {place: {} for place in PLACES}
        for span, size in running.items():
            self.bounds[span[1]][span] = size // 2

    def running(self, span: Span) -> int:
        return self.counts.get(span, self.bounds[span[1]][span])

    def trainable(self, span: Span) -> int:
        return sum(self.trainable_of_step[span[0] + 1 : span[1] + 1])

    def is_counted(self, span: Span) -> bool:
        return span in self.counts

    def count(self, spans: tuple[Span, ...], *, again: bool = False) -> None:
        for span in spans:
            self.counts[span] = self.true_running[span]


def all_spans() -> list[Span]:
    return list(combinations([START, *PLACES], 2))


def all_cuts() -> Iterator[list[Span]]:
    for number in range(1, len(PLACES)):
        for cuts in combinations(PLACES[:-1], number):
            ends = [*cuts, PLACES[-1]]
            yield list(zip([START, *cuts], ends, strict=True))


def peak(costs: MadeUp, spans: list[Span]) -> int:
    """Return the peak of a step, by its definition."""
    heads = [costs.heads[end] for _, end in spans[:-1]]
    held = costs.input_bytes + costs.model.lasting + sum(head.lasting for head in heads)
    gradients = 0
    peaks = []
    for i, span in enumerate(spans):
        peaks.append(gradients + costs.true_running[span])
        gradients += costs.trainable(span) + (heads[i].trainable if i < len(heads) else 0)
    largest = max([costs.model.largest, *(head.largest for head in heads)])
    return held + max([*peaks, gradients + UPDATE * largest])


sizes = st.integers(1, 60)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    running=st.lists(sizes, min_size=10, max_size=10),
    heads=st.lists(sizes, min_size=3, max_size=3),
    trainable=st.lists(sizes, min_size=4, max_size=4),
    share=st.floats(0.5, 1.5),
)
def test_the_coarsest_and_the_smallest_are_those_of_all_cuts(running, heads, trainable, share):
    spans = dict(zip(all_spans(), running, strict=True))
    whole = (START, PLACES[-1])
    del spans[whole]  # the classifier begins behind the first place at the earliest
    costs: Any = MadeUp(spans, heads, trainable)
    peaks = {tuple(cut): peak(costs, cut) for cut in all_cuts()}
    least = min(peaks.values())
    assert Search(costs).smallest().peak == least
    allowed = round(least * share)
    fitting = {cut: size for cut, size in peaks.items() if size <= allowed}
    path = Search(MadeUp(spans, heads, trainable)).coarsest(allowed)
    if not fitting:
        assert path is None
        return
    fewest = min(len(cut) for cut in fitting)
    best = min(size for cut, size in fitting.items() if len(cut) == fewest)
    assert (len(path.spans), path.peak) == (fewest, best)
    assert peaks[path.spans] == path.peak


def test_a_block_that_takes_more_in_its_own_plan_is_counted_again():
    """The first plan looks best until its blocks are counted together."""
    spans = {(START, 0): 10, (0, 3): 10, (START, 1): 11, (1, 3): 11}
    costs: Any = MadeUp(spans, [1, 1, 1], [1, 1, 1, 1])
    plain_count = costs.count

    def count(chosen: tuple[Span, ...], *, again: bool = False) -> None:
        plain_count(chosen, again=again)
        if again and (0, 3) in chosen:
            costs.counts[0, 3] = 50

    costs.count = count
    assert Search(costs).smallest().spans == ((START, 1), (1, 3))


@pytest.mark.parametrize("allowed", [0, 1])
def test_nothing_fits_into_nothing(allowed):
    spans = dict.fromkeys(all_spans()[:3] + all_spans()[4:], 10)
    costs: Any = MadeUp(spans, [1, 1, 1], [1, 1, 1, 1])
    assert Search(costs).coarsest(allowed) is None
