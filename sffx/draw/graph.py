"""A block plan as a Graphviz graph: a pure function from the plan to DOT text, which needs no Graphviz."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sffx.blocks import Block, BlockPlan
from sffx.draw.fold import Run, fold, leaves_in
from sffx.draw.inner import joins_in_words
from sffx.draw.label import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    INK,
    RED,
    VALUE_WIDTH,
    block_label,
    cut_in_words,
    edge_label,
    footer_label,
    head_label,
    input_label,
    printable,
    shorten,
    stop_label,
    title_label,
)
from sffx.draw.progress import Progress

# Boxes in one column. A taller plan is set in several columns: top to bottom, then the next column to the right.
ROWS = 14
# More edges than this from one value, or into one block, become a rail beside the blocks.
EDGES = 2

FONT = 'fontname="Helvetica,Arial,sans-serif"'
DEFAULTS = (
    f'graph [bgcolor="white", charset="UTF-8", {FONT}, labelloc="b", labeljust="l", newrank=true, nodesep=0.3, pad=0.3, ranksep=0.2]',
    f'node [shape="box", style="rounded,filled", margin="0.14,0.08", {FONT}]',
    f"edge [arrowsize=0.7, penwidth=1.2, {FONT}]",
)
BLOCK = 'class="block", fillcolor="#f7f8fa", color="#9aa5b1"'
UNTRACED = f'class="block untraced", fillcolor="#fdf6e9", color="{AMBER}"'
CLASSIFIER = f'class="classifier", fillcolor="#eef3ee", color="{GREEN}"'
HEAD = f'class="head", fillcolor="#e8f1fb", color="{BLUE}"'
OUTSIDE = f'class="input", fillcolor="white", color="{INK}"'
RAIL = f'class="rail", color="{GREY}"'


@dataclass(frozen=True)
class Crossing:
    """Values that blocks read from outside besides the normalised output of the block before.

    Attributes:
        names: of the values; those that run the same way are drawn together.
        source: name of the node in the drawing that they come from.
        stage: index of the block that computes them, -1 for what does not come from a block.
        readers: indices of the blocks that read them, the classifier's is the last.
        detached: whether the cut stops a gradient that they carry.
    """

    names: tuple[str, ...]
    source: str
    stage: int
    readers: tuple[int, ...]
    detached: bool


def dot(plan: BlockPlan, *, unfold: bool = False, progress: Progress | None = None) -> str:
    """DOT text of the block graph: the blocks in order, their heads, the cuts, and the values that cross a cut.

    Args:
        plan: of the model, as `sffx.plan` returns it.
        unfold: whether blocks in a row that look alike are drawn one by one even where they are more than a column holds.
        progress: of a training, by which the blocks are coloured; then none of them are drawn as one.

    Returns:
        the text of a directed graph. A block's node bears its target ("block_3", "classifier"), its head "head_3",
        a model input "input_x". The same plan always gives the same text.
    """
    whole, plan = plan, plan if unfold or progress or len(plan) < ROWS else fold(plan)
    rows = _rows(plan)
    crossed = crossings(plan)
    railed = _railed(crossed)
    shown = {
        "detached" if crossing.detached else "side" for crossing in crossed if crossing.stage >= 0
    } | ({"rail"} if railed else set())
    shown |= {"run"} if any(isinstance(block, Run) for block in plan) else set()
    shown |= {"join"} if any(map(joins_in_words, plan.all_blocks)) else set()
    lines = [
        *DEFAULTS,
        f"label={footer_label(plan, shown, progress)}",
        "subgraph cluster_plan {",
        f'label={title_label(whole, progress)}; labelloc="t"; margin=0; peripheries=0',
    ]
    lines += [
        *_input_nodes(plan, crossed),
        *_block_nodes(plan, rows, progress),
        *_same_rows(plan, rows),
        *_cuts(plan, rows),
    ]
    lines += _rail(railed, plan, rows)
    for crossing in crossed:
        lines += [] if crossing in railed else _edges(crossing, plan, rows)
    return "digraph {\n" + "".join(f"  {line}\n" for line in [*lines, "}"]) + "}\n"


def _rows(plan: BlockPlan) -> int:
    stages = len(plan) + 1
    return math.ceil(stages / math.ceil(stages / ROWS))


def _input_nodes(plan: BlockPlan, crossings: list[Crossing]) -> Iterator[str]:
    for value in plan.inputs:
        yield node(f"input_{value.name}", f"{OUTSIDE}, label={input_label(value)}")
    for crossing in crossings:
        if crossing.source.startswith("value_"):
            yield node(
                crossing.source,
                f'{OUTSIDE}, style="rounded,dashed", label={edge_label(_marked(crossing), INK)}',
            )


def _block_nodes(plan: BlockPlan, rows: int, progress: Progress | None) -> Iterator[str]:
    for index, block in enumerate(plan.all_blocks):
        # Boxes of one group are set straight below each other.
        yield node(block.target, f'{look(block, plan, progress)}, group="column_{index // rows}"')
        if block is not plan.classifier:
            yield from head_beside(block, block.target, plan)


def look(block: Block, plan: BlockPlan, progress: Progress | None, *, contents: bool = True) -> str:
    """The attributes of a block's box."""
    leaves = leaves_in(block, plan)
    kind = CLASSIFIER if block is plan.classifier else UNTRACED if leaves else BLOCK
    many = ", peripheries=2" if isinstance(block, Run) else ""
    # Of two attributes with one name, Graphviz takes the last.
    colour = f', fillcolor="{progress.accuracy_colour(block.target)}"' if progress else ""
    return f"{kind}{many}{colour}, label={block_label(block, leaves, progress, contents=contents)}, tooltip={quote(block.name)}"


def head_beside(block: Block, name: str, plan: BlockPlan) -> Iterator[str]:
    """A block's head, at the right of the node of that name."""
    head = block.target.replace("block", "head")
    yield node(
        head,
        f"{HEAD}{', peripheries=2' if isinstance(block, Run) else ''}, label={head_label(block, plan)}",
    )
    yield beside(edge(name, head, f'class="head", color="{BLUE}"'))


def _same_rows(plan: BlockPlan, rows: int) -> Iterator[str]:
    stages = plan.all_blocks
    for row in range(min(rows, len(stages) - rows)):
        yield beside("; ".join(quote(stage.target) for stage in stages[row::rows]))


def _cuts(plan: BlockPlan, rows: int) -> Iterator[str]:
    stages = plan.all_blocks
    style = f'class="cut", color="{RED}", style="dashed", penwidth=1.6, weight=100, label={edge_label([cut_in_words(plan.options)], RED)}'
    for index in range(1, len(stages)):
        turn = ', constraint=false, headport="w"' if index % rows == 0 else ""
        yield edge(stages[index - 1].target, stages[index].target, style + turn)


def crossings(plan: BlockPlan) -> list[Crossing]:
    """The values that cross a cut besides the normalised output of a block, and those that come from outside."""
    stages = plan.all_blocks
    names = dict.fromkeys(name for stage in stages for name in stage.inputs)
    groups: dict[tuple[str, int, tuple[int, ...], bool], list[str]] = {}
    for name in names:
        stage = next(
            (
                index
                for index, block in enumerate(plan.blocks)
                if name == block.output or name in block.sides
            ),
            -1,
        )
        handed_on = stage + 1 if stage >= 0 and name == stages[stage].output else -1
        readers = tuple(
            index
            for index, block in enumerate(stages)
            if name in block.inputs and index not in (stage, handed_on)
        )
        # An output that a block further on reads carries a gradient, as every output does.
        detached = stage >= 0 and name in (*stages[stage].detached, stages[stage].output)
        source = stages[stage].target if stage >= 0 else outside(name, plan)
        if readers:
            groups.setdefault((source, stage, readers, detached), []).append(name)
    return [
        Crossing(tuple(group), source, stage, readers, cut)
        for (source, stage, readers, cut), group in groups.items()
    ]


def outside(name: str, plan: BlockPlan) -> str:
    """The node in the drawing of a value that no block computes: an input of the model, or a value from nowhere."""
    # fx renames an argument that is a builtin: the node of `input` is `input_1`.
    given = {value.name for value in plan.inputs}
    return next(
        (f"input_{known}" for known in (name, re.sub(r"_\d+$", "", name)) if known in given),
        f"value_{name}",
    )


def _edges(crossing: Crossing, plan: BlockPlan, rows: int) -> Iterator[str]:
    for reader in crossing.readers:
        # The edge from an input to the first block needs no name: the input bears it.
        name = (
            f", label={edge_label(_marked(crossing), _colour(crossing))}"
            if crossing.stage >= 0 or reader
            else ""
        )
        yield edge(
            crossing.source,
            plan.all_blocks[reader].target,
            _style(crossing) + name + _free(crossing.stage, reader, rows),
        )


def _railed(crossings: list[Crossing]) -> list[Crossing]:
    """The values that would be too many edges: with many readers each, or many of them with a reader in common."""
    few = [crossing for crossing in crossings if len(crossing.readers) <= EDGES]
    load = Counter(reader for crossing in few if crossing.stage >= 0 for reader in crossing.readers)
    many = {reader for reader, edges in load.items() if edges > EDGES}
    return [
        crossing
        for crossing in crossings
        if crossing not in few or (crossing.stage >= 0 and many & set(crossing.readers))
    ]


def _rail(crossings: list[Crossing], plan: BlockPlan, rows: int) -> Iterator[str]:
    """A line along a column, with a stop beside each block that takes values from it or gives values to it, which names them."""
    stages = plan.all_blocks
    stops = sorted(
        {stop for crossing in crossings for stop in (crossing.stage, *crossing.readers)} - {-1}
    )
    for stop in stops:
        given = [
            (f"+ {name}", _colour(crossing))
            for crossing in crossings
            if crossing.stage == stop
            for name in _marked(crossing)
        ]
        taken = [
            (name, _colour(crossing))
            for crossing in crossings
            if stop in crossing.readers
            for name in _marked(crossing)
        ]
        yield node(
            f"stop_{stop}",
            f'class="stop", shape="plain", style="", label={stop_label([*given, *taken])}',
        )
        # Graphviz sets the tail of such an edge to the left, so what a block gives is drawn as an edge backwards.
        ways = "both" if given and taken else "back" if given else "forward"
        yield beside(edge(f"stop_{stop}", stages[stop].target, f'{RAIL}, dir="{ways}"'))
    for crossing in crossings:
        if crossing.stage < 0:
            yield edge(crossing.source, f"stop_{crossing.readers[0]}", _style(crossing))
    for before, after in itertools.pairwise(stops):
        if before // rows == after // rows:
            yield edge(f"stop_{before}", f"stop_{after}", f'{RAIL}, dir="none", weight=5')


def _marked(crossing: Crossing) -> list[str]:
    return [
        f"{shorten(name, VALUE_WIDTH)} (detached)"
        if crossing.detached
        else shorten(name, VALUE_WIDTH)
        for name in crossing.names
    ]


def _colour(crossing: Crossing) -> str:
    if crossing.stage < 0:
        return INK
    return RED if crossing.detached else GREY


def _style(crossing: Crossing) -> str:
    kind = "input" if crossing.stage < 0 else "side detached" if crossing.detached else "side"
    return f'class="{kind}", color="{_colour(crossing)}"' + (
        ', style="dotted"' if crossing.detached else ""
    )


def _free(stage: int, reader: int, rows: int) -> str:
    # Across columns an edge may lead upwards, so it must not push its reader down.
    return ", constraint=false" if stage >= 0 and stage // rows != reader // rows else ""


def node(name: str, attributes: str) -> str:
    """The statement of a node in DOT."""
    return f"{quote(name)} [{attributes}]"


def edge(tail: str, head: str, attributes: str) -> str:
    """The statement of an edge in DOT."""
    return f"{quote(tail)} -> {quote(head)} [{attributes}]"


def beside(statement: str) -> str:
    """What sets the nodes of a statement in one row."""
    return f"{{ rank=same; {statement} }}"


def quote(text: str) -> str:
    """Any text as a quoted string in DOT."""
    # In a quoted string only the quote is special; in a tooltip the backslash is as well.
    return '"' + printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
