"""Count the batches of all batch norms of a step by one operation.

torch's batch norms add 1 to `num_batches_tracked` in their forward pass. Each addition is an
operation, and a kernel launch on a GPU. A norm with a momentum does not read the number. So it is
enough to add the batches when the step is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from sffx.kernels.chain import BATCH_NORMS
from sffx.kernels.recompute import is_plain
from sffx.kernels.scoped import scoped

_NAME = "num_batches_tracked"


class _Count:
    """Stands in for `num_batches_tracked` in a forward pass, and counts without an operation."""

    def __init__(self) -> None:
        self.batches = 0

    def add_(self, batches: int) -> _Count:
        self.batches += batches
        return self


class _Step:
    """The batches that norms have counted in a step, and that are still to be added."""

    def __init__(self) -> None:
        self._counts: list[tuple[nn.Module, _Count]] = []

    def note(self, norm: nn.Module, count: _Count) -> None:
        self._counts.append((norm, count))

    def add(self) -> None:
        """Add the counts to the norms' own numbers, by one operation."""
        sums: dict[Tensor, int] = {}
        for norm, count in self._counts:
            # Two norms may share their number, and one operation may write it only once.
            number = cast(Tensor, norm.num_batches_tracked)
            sums[number] = sums.get(number, 0) + count.batches
        ran = {number: batches for number, batches in sums.items() if batches}
        if ran:
            torch._foreach_add_(list(ran), list(ran.values()))


_STEP: ContextVar[_Step | None] = ContextVar("batches of a step", default=None)


@contextmanager
def counts_added_at_end(wanted: bool) -> Iterator[None]:
    """Add the counts that `counts_postponed` keeps back at the end of the context, a step.

    If the step fails, the norms that ran have counted, as with torch.

    Args:
        wanted: False leaves counting to torch, where somebody may look at the norms before the end.
    """
    if not wanted:
        yield
        return
    step = _Step()
    try:
        with scoped(_STEP, step):
            yield
    finally:
        step.add()


@contextmanager
def counts_postponed(find_norms: Callable[[], Iterable[nn.Module]]) -> Iterator[None]:
    """Postpone the counts of norms that run in the context, within `counts_added_at_end`.

    Args:
        find_norms: returns modules. Those that read their number in the forward pass, and those
            that are no batch norms, are passed over.
    """
    step = _STEP.get()
    if step is None or torch.compiler.is_compiling():
        yield
        return
    # `find_norms` may return a module twice.
    norms = dict.fromkeys(norm for norm in find_norms() if _can_wait(norm))
    for norm in norms:
        count = _Count()
        step.note(norm, count)
        # An attribute hides the buffer of this name, which stays in the state dict.
        vars(norm)[_NAME] = count
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)[_NAME]


def _can_wait(norm: Any) -> bool:
    """Return whether a forward would add 1 to the norm's number, and would not read it."""
    return (
        type(norm) in BATCH_NORMS
        and norm.training
        and norm.track_running_stats
        # None stands for the mean over all batches, which needs their number.
        and norm.momentum is not None
        and norm._buffers[_NAME] is not None
        and norm._compiled_call_impl is None
        and _NAME not in vars(norm)
        and is_plain(norm)
    )
