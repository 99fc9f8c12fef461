"""The cut sets that a user or a policy names: all values that cross each cut.

A cut names the values that the block before it gives to later blocks. A value that crosses an
earlier cut as well may be left out: if `skip` crosses ("skip", "down"), then "up" behind it stands
for ("skip", "up").
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
    inside: set[str] = set()  # the nodes on paths that run before the cut
    for cut in in_order:
        names = names_in(cut)
        inside |= flow.inside(names)
        crossing = flow.crossing(inside)
        earlier = cut_sets[-1] if cut_sets else frozenset()
        known = {*names, *earlier}
        if not known.issuperset(crossing):
            raise CutError(_passed_by(cut, crossing, hint))
        unread = [name for name in names if name not in crossing and name != flow.logits]
        if unread:
            raise CutError(
                f"no cut can lie {in_words(cut)}: nothing after it reads {', '.join(unread)}. "
                f"Hint: {hint}"
            )
        # Nothing crosses behind the logits. The refusal of that step says why no cut may lie there.
        cut_sets.append(frozenset(crossing or names))
    return cut_sets


def _place(flow: Dataflow, cut: Cut) -> tuple[int, int]:
    """Return a key by which cuts are in the order of the model.

    Cuts with the same last value, as "up" and ("skip", "up"), differ in what runs before them.
    """
    names = names_in(cut)
    *_, last = flow.in_order(names)
    return flow.position(last), len(flow.before(names))


def _passed_by(cut: Cut, crossing: Sequence[str], hint: str) -> str:
    """Return the error of a cut that leaves out a value that crosses it."""
    reason = PASSED_BY if len(names_in(cut)) == 1 else "other values cross it as well"
    return (
        f"no cut can lie {in_words(cut)}: {reason}. "
        f"Hint: a cut across all values there is {tuple(crossing)}. {hint}"
    )
