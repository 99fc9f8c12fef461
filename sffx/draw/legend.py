"""The legend of pictures and pages: what each mark means."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sffx.blocks import BlockPlan, option_name
from sffx.draw.style import BLUE, FAINT, GREEN, GREY, INK, RED, TEAL
from sffx.draw.words import classifier_in_words, heads_in_words, prediction_in_words


@dataclass(frozen=True)
class Entry:
    """One line of the legend.

    Attributes:
        kind: what a drawing must contain for the line to be shown; "" for a line that always is.
        mark: a sample of what is drawn.
        colour: of the sample.
        meaning: in words. {cut}, {heads}, {prediction} and {classifier} stand for what a cut does,
            how the heads work, how they predict, and how the classifier learns.
    """

    kind: str
    mark: str
    colour: str
    meaning: str


ALIKE = "blocks in a row that have the same modules, shape and cost"

LEGEND = (
    Entry("", "– – →", RED, "cut: the output is {cut}; no gradient crosses"),
    Entry(
        "",
        "–––→",
        BLUE,
        "goodness ({heads}): the block learns by it alone; {prediction}",
    ),
    Entry("run", "double box", INK, ALIKE),
    Entry("thick", "thick frame", INK, ALIKE),
    Entry("", "last box", GREEN, "classifier: {classifier}"),
    Entry(
        "join",
        "inside",
        TEAL,
        "paths that part and meet inside the block, as a shortcut does; "
        "gradient runs through them as ever",
    ),
    Entry(
        "wide",
        "cat of 9",
        TEAL,
        "reads nine values, of which the edge of the last is drawn; "
        "an svg names them where the pointer rests",
    ),
    Entry(
        "side", "–––→", GREY, "side value: a later block reads it as well; it carries no gradient"
    ),
    Entry(
        "detached",
        "· · · →",
        RED,
        "side value, detached: it carries a gradient, which the cut stops",
    ),
    Entry(
        "rail",
        "+ a · a",
        GREY,
        "+ a: the block computes the side value a; a: the block reads it",
    ),
    Entry(
        "",
        "in a box",
        FAINT,
        "output shape · parameters · multiply-adds (MACs) · activations kept for backward; "
        "both of one sample",
    ),
)

NORMS = {
    "none": "detached",
    "layer": "detached and layer-normed",
    "length": "detached, and divided by its length",
    "batch": "detached and batch-normed",
}


def entries(kinds: Collection[str], plan: BlockPlan) -> list[Entry]:
    """Return the lines of the legend for a drawing, with the words of its plan filled in.

    Args:
        kinds: what the drawing contains, by the `kind` of the entries.
        plan: its norm and its heads are named.
    """
    norm = option_name(plan.options.norm)
    words = {
        "cut": NORMS.get(norm, f"detached and normed ({norm})"),
        "heads": heads_in_words(plan.options, plan.task),
        "prediction": prediction_in_words(plan),
        "classifier": classifier_in_words(plan),
    }
    lines = []
    for entry in LEGEND:
        if not entry.kind or entry.kind in kinds:
            meaning = entry.meaning.format(**words)
            lines.append(Entry(entry.kind, entry.mark, entry.colour, meaning))
    return lines
