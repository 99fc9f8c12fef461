"""The parts of a block as lines of a page, with arcs from each part to those that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sffx.draw.detail import JOIN_SIGNS, Part
from sffx.draw.words import shorten

# In a list of parts: the height of a line, the room at its left for arcs, and both ends of an arc
# away from the text, in pixels; the width of a name, in characters.
PART_HEIGHT = 20
ARC_ROOM = 72
ARC_GAP = 6
PART_WIDTH = 52


@dataclass(frozen=True)
class Words:
    """A text with the CSS classes of its element, and the text that a pointer on it shows."""

    text: str
    kind: str = ""
    title: str = ""


@dataclass(frozen=True)
class Arc:
    """A line from a part to one that reads it, as the course of an SVG path."""

    kind: str
    course: str


@dataclass(frozen=True)
class Flow:
    """The parts of a block as lines, with an arc at the left from each part to its readers.

    Attributes:
        lines: the values from outside, then the parts in the order they run.
        arcs: between the lines.
        width: of the room for the arcs, in pixels.
        height: of all lines, in pixels.
    """

    lines: list[Words]
    arcs: list[Arc]
    width: int
    height: int


def flow_of(inside: Sequence[Part]) -> Flow:
    """Return the parts of a block as lines with arcs."""
    own = {part.node.name for part in inside}
    # A dict has each value once, in the order in which the parts read them.
    outer: dict[str, None] = {}
    for part in inside:
        for read in part.node.reads:
            if read not in own:
                outer[read] = None
    names = [*outer, *(part.node.name for part in inside)]
    rows = {name: row for row, name in enumerate(names)}

    lines = []
    for name in outer:
        lines.append(Words(f"{shorten(name, PART_WIDTH)} →", "outer", f"{name}, from outside"))
    arcs = []
    for part in inside:
        text = shorten(part.text, PART_WIDTH)
        lines.append(Words(text, _part_kind(part), part.node.name))
        for read in part.node.reads:
            arcs.append(_arc(rows[read], rows[part.node.name]))
    return Flow(lines, arcs, ARC_ROOM, PART_HEIGHT * len(names))


def _part_kind(part: Part) -> str:
    if part.node.join in JOIN_SIGNS:
        return "join"
    return "" if part.node.is_path else "aside"


def _arc(start: int, end: int) -> Arc:
    """Return the arc between two lines; the more lines it passes, the further it reaches left."""
    # Both ends are close to the texts, at the right of the room.
    side = ARC_ROOM - ARC_GAP
    passed = end - start - 1
    # The two control points of the curve lie 8 pixels further left for each line passed.
    reach = side - min(side - ARC_GAP, 8 * passed)
    # The middles of the two lines. Arcs begin a little below and end a little above, so that those
    # of one line stay apart.
    top = PART_HEIGHT * start + PART_HEIGHT / 2
    bottom = PART_HEIGHT * end + PART_HEIGHT / 2
    control_points = f"{reach} {top + 6:g} {reach} {bottom - 6:g}"
    course = f"M {side} {top + 3:g} C {control_points} {side} {bottom - 3:g}"
    return Arc("skip" if passed else "next", course)
