"""Count the batches of all batch norms of a step by one operation.

torch's batch norms add 1 to `num_batches_tracked` in their forward pass, an operation each. On a
GPU every one of them is a launch. With a momentum of their own, norms do not read that number. So
it is enough to have counted when the step is over.
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
    """The batches that the norms of a step have counted, but not yet added."""

    def __init__(self) -> None:
        self._counts: list[tuple[nn.Module, _Count]] = []

    def note(self, norm: nn.Module, count: _Count) -> None:
        self._counts.append((norm, count))

    def add(self) -> None:
        """Add what was counted to the norms' own numbers."""
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
def counted_by_step(wanted: bool) -> Iterator[None]:
    """Let norms in `counted_for_step` count at the end of the context, by one operation.

    If the step fails, the norms that ran have counted, as with torch.

    Args:
        wanted: False if somebody may look at the norms before the end.
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
def counted_for_step(find_norms: Callable[[], Iterable[nn.Module]]) -> Iterator[None]:
    """Let norms whose forward runs inside count for the step, if there is one.

    Args:
        find_norms: returns modules. Those that need their number in the forward pass count
            themselves.
    """
    step = _STEP.get()
    if step is None or torch.compiler.is_compiling():
        yield
        return
    # A module may have two names.
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
    """Return whether a forward adds 1 to the norm's number, and nobody reads the number."""
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
