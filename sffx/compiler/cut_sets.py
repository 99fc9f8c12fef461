"""The cut sets that a user or a policy names: all values that cross each cut.

A cut names the values that the block before it gives on. Values that cross an earlier cut as well
may be left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeAlias

from sffx.compiler.dataflow import Dataflow
from sffx.errors import CutError

# The name of the node whose value crosses a cut; a tuple of names where several values do. The
# main value is the last one.
Cut: TypeAlias = str | tuple[str, ...]

PASSED_BY = "it does not dominate the output: some path from input to logits passes it by"


def main_value(cut: Cut) -> str:
    """Return the name of the main value of a cut."""
    return cut if isinstance(cut, str) else cut[-1]


def names_in(cut: Cut) -> tuple[str, ...]:
    """Return the names of the values that a cut names."""
    return (cut,) if isinstance(cut, str) else tuple(cut)


def in_words(cut: Cut) -> str:
    """Return what an error calls a cut: "after node 'a'" or "across ('a', 'b')"."""
    names = names_in(cut)
    return f"after node {names[0]!r}" if len(names) == 1 else f"across {names}"


def complete(flow: Dataflow, cuts: Iterable[Cut], hint: str) -> list[frozenset[str]]:
    """Return for each cut all values that cross it, in the order of the model.

    Args:
        flow: the dataflow of the model.
        cuts: names of nodes on paths that lead to the logits.
        hint: what an error says in the end.

    Raises:
        CutError: another value crosses a cut, or a value is not read after it; names the value.
    """
    in_order = sorted(cuts, key=partial(_place, flow))
    cut_sets: list[frozenset[str]] = []
    inside: set[str] = set()
    for cut in in_order:
        inside |= flow.before(names_in(cut))
        crossing = flow.crossing(inside)
        earlier = cut_sets[-1] if cut_sets else frozenset()
        missing = [name for name in crossing if name not in names_in(cut) and name not in earlier]
        if missing:
            raise CutError(_passed_by(cut, crossing, hint))
        unread = [name for name in names_in(cut) if name not in crossing and name != flow.logits]
        if unread:
            raise CutError(
                f"no cut can lie {in_words(cut)}: nothing after it reads {', '.join(unread)}. "
                f"Hint: {hint}"
            )
        cut_sets.append(frozenset(crossing or names_in(cut)))
    return cut_sets


def _place(flow: Dataflow, cut: Cut) -> tuple[int, int]:
    """Return a key by which cuts are in the order of the model."""
    *_, last = flow.in_order(names_in(cut))
    return flow.position(last), len(flow.before(names_in(cut)))


def _passed_by(cut: Cut, crossing: Sequence[str], hint: str) -> str:
    reason = PASSED_BY if len(names_in(cut)) == 1 else "other values cross it as well"
    return (
        f"no cut can lie {in_words(cut)}: {reason}. "
        f"Hint: a cut across all values there is {tuple(crossing)}. {hint}"
    )
