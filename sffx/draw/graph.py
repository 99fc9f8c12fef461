"""The graph of a plan: a box for each block, its head, the cuts, and the values that cross them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sffx.blocks import Block, BlockPlan
from sffx.draw.crossings import Crossing, crossings, is_read_by_next, side_kinds
from sffx.draw.detail import joins_in_words
from sffx.draw.fold import Run, fold, last_of, leaves_in
from sffx.draw.labels import (
    block_label,
    edge_label,
    footer_label,
    head_label,
    input_label,
    stop_label,
    title_label,
)
from sffx.draw.progress import Progress
from sffx.draw.style import (
    AMBER,
    BLUE,
    EDGE_STYLE,
    FAINT,
    GRAPH_STYLE,
    GREEN,
    GREY,
    INK,
    NODE_STYLE,
    PLAIN_TEXT,
    RED,
    VALUE_WIDTH,
)
from sffx.draw.words import NOT_READ, cut_in_words, heading, printable, shorten
from sffx.errors import MissingExtra
from sffx.parts import head_name, index_of

if TYPE_CHECKING:
    from graphviz import Digraph

# The most boxes in one column. A taller plan has several columns, from left to right.
ROWS = 14
# In a plan of more blocks than this, blocks in a row that look alike are one box.
FEW = 8
# More edges than this from one value, or into one block, become a rail beside the blocks.
EDGES = 2

BLOCK = {"class": "block", "fillcolor": "#f7f8fa", "color": "#9aa5b1"}
UNTRACED = {"class": "block untraced", "fillcolor": "#fdf6e9", "color": AMBER}
CLASSIFIER = {"class": "classifier", "fillcolor": "#eef3ee", "color": GREEN}
HEAD = {"class": "head", "fillcolor": "#e8f1fb", "color": BLUE}
HEAD_EDGE = {"class": "head", "color": BLUE}
OUTSIDE = {"class": "input", "fillcolor": "white", "color": INK}
RAIL = {"class": "rail", "color": GREY}
CUT = {"class": "cut", "color": RED, "style": "dashed", "penwidth": "1.6"}
# A sign where a cut leads from one column to the next: "to block_9" at the end of the first column,
# "from block_8" at the top of the second.
TURN = {"class": "turn", "fontcolor": RED, "fontsize": "9", **PLAIN_TEXT}
CUT_FROM_TURN = {**CUT, "class": "cut turn"}
# In the place of a cut, where the next block does not read the output.
GAP = {"class": "gap", "color": FAINT, "style": "dotted", "dir": "none"}
INVISIBLE = {"style": "invis"}
ANCHOR = {"shape": "point", "height": "0", "width": "0", "label": "", **INVISIBLE}


@dataclass(frozen=True)
class Columns:
    """A plan whose boxes are set in columns.

    Attributes:
        plan: as it is drawn, folded or not.
        rows: how many boxes a column has.
    """

    plan: BlockPlan
    rows: int

    def of(self, index: int) -> int:
        """Return the column of a block."""
        return index // self.rows


def block_graph(
    plan: BlockPlan, *, unfold: bool = False, progress: Progress | None = None
) -> Digraph:
    """Return the graph of a plan: the blocks in order, their heads, the cuts, and the side values.

    A block's node is named by its target ("block_3", "classifier"), its head "head_3", a model
    input "input_x". The same plan always gives the same source text.

    Args:
        plan: of the model, as `sffx.plan` returns it.
        unfold: whether blocks in a row that look alike are drawn one by one. By default they are
            one box in a plan of more than a few blocks.
        progress: of a training. It gives the blocks their colours, and then no block is folded.

    Raises:
        MissingExtra: the package graphviz is not installed.
    """
    is_folded = not unfold and progress is None and len(plan) > FEW
    drawn = fold(plan) if is_folded else plan
    columns = Columns(drawn, _rows(drawn))
    crossed = crossings(drawn)
    railed = _railed(crossed)

    graph = new_graph(heading(plan))
    graph.attr(label=footer_label(drawn, _kinds(drawn, crossed, railed), progress))
    with graph.subgraph(name="cluster_plan") as inner:
        title = title_label(plan, progress)
        inner.attr(label=title, labelloc="t", margin="0", peripheries="0")
        order_columns(inner, _tops(columns))
        _add_inputs(inner, drawn, crossed)
        _add_blocks(inner, columns, progress)
        _align_rows(inner, columns)
        _add_cuts(inner, columns)
        _add_rail(inner, railed, columns)
        for crossing in crossed:
            if crossing not in railed:
                _add_edges(inner, crossing, columns)
    return graph


def new_graph(title: str = "plan") -> Digraph:
    """Return an empty graph that looks as all drawings of plans do.

    Args:
        title: of an svg, which a browser shows where the pointer rests. Graphviz's own is "%3".

    Raises:
        MissingExtra: the package graphviz is not installed.
    """
    try:
        from graphviz import Digraph
    except ImportError as error:
        purpose = "drawing a graph (a path that ends in .html needs nothing)"
        raise MissingExtra("graphviz", "viz", purpose) from error
    name = printable(title)
    return Digraph(name, graph_attr=GRAPH_STYLE, node_attr=NODE_STYLE, edge_attr=EDGE_STYLE)


def block_style(block: Block, plan: BlockPlan, progress: Progress | None) -> dict[str, str]:
    """Return how the box of a block looks: by its kind, and by its accuracy after a training."""
    if block is plan.classifier:
        style = dict(CLASSIFIER)
    elif leaves_in(block, plan):
        style = dict(UNTRACED)
    else:
        style = dict(BLOCK)
    if isinstance(block, Run):
        style["peripheries"] = "2"
    colour = "" if progress is None else progress.accuracy_colour(block.target)
    if colour:
        style["fillcolor"] = colour
    style["tooltip"] = literal(block.name)
    return style


def add_head(graph: Digraph, block: Block, node: str, plan: BlockPlan) -> None:
    """Add the head of a block, at the right of a node."""
    head = head_name(index_of(block.target))
    style = dict(HEAD)
    if isinstance(block, Run):
        style["peripheries"] = "2"
    graph.node(head, label=head_label(block, plan), **style)
    add_edge_in_row(graph, node, head, HEAD_EDGE)


def add_edge_in_row(graph: Digraph, tail: str, head: str, style: dict[str, str]) -> None:
    """Add an edge whose ends stand beside each other."""
    with graph.subgraph() as row:
        row.attr(rank="same")
        row.edge(tail, head, **style)


def add_sign_to(graph: Digraph, following: Block) -> None:
    """Add the sign "to_block_9" at the end of a column, where the cut leads to the next column."""
    graph.node(f"to_{following.target}", label=f"to {following.target}", **TURN)


def add_sign_from(graph: Digraph, block: Block) -> None:
    """Add the sign "from_block_8" at the top of a column, where the cut comes in."""
    graph.node(f"from_{block.target}", label=f"from {last_of(block).target}", **TURN)


def cut_styles(index: int, plan: BlockPlan) -> tuple[dict[str, str], dict[str, str]]:
    """Return the styles of the edge behind a feature block, and of that behind a "from" sign.

    It is the edge of the cut, or, where the next block does not read the output, that of a gap.
    """
    if is_read_by_next(index, plan):
        return {**CUT, "label": edge_label([cut_in_words(plan.options)], RED)}, CUT_FROM_TURN
    return {**GAP, "label": edge_label([NOT_READ], FAINT)}, GAP


def order_columns(graph: Digraph, tops: Sequence[str]) -> None:
    """Set columns from left to right.

    Without a constraint, Graphviz chooses the order itself; old versions go from right to left. So
    an invisible row of anchors stands above the columns. Each anchor has an edge to its column.
    Graphviz avoids crossing edges, so the columns come in the order of the anchors.

    Args:
        graph: to add the anchors to.
        tops: the node at the top of each column, in the order of the columns.
    """
    if len(tops) < 2:
        return
    anchors = [f"above_{top}" for top in tops]
    with graph.subgraph() as row:
        row.attr(rank="same")
        for anchor in anchors:
            row.node(anchor, **ANCHOR)
        for left, right in itertools.pairwise(anchors):
            row.edge(left, right, **INVISIBLE)
    for anchor, top in zip(anchors, tops, strict=True):
        graph.edge(anchor, top, **INVISIBLE)


def literal(text: str) -> str:
    """Return a text as the value of an attribute. Graphviz reads no markup in it."""
    from graphviz import escape

    return escape(printable(text))


def _rows(plan: BlockPlan) -> int:
    """Return how many rows the columns have, so that all columns are about equally tall.

    With 14 rows at most, 20 blocks stand in two columns of 10.
    """
    blocks = len(plan.all_blocks)
    columns = math.ceil(blocks / ROWS)
    return math.ceil(blocks / columns)


def _kinds(plan: BlockPlan, crossed: Sequence[Crossing], railed: Collection[Crossing]) -> set[str]:
    """Return what the drawing contains besides blocks and cuts, by the kinds of the legend."""
    kinds = side_kinds(crossed)
    if railed:
        kinds.add("rail")
    if any(isinstance(block, Run) for block in plan):
        kinds.add("run")
    if any(joins_in_words(block) for block in plan.all_blocks):
        kinds.add("join")
    return kinds


def _railed(crossed: Sequence[Crossing]) -> list[Crossing]:
    """Return the crossings that are drawn at the rail, because their edges would be too many.

    There may be too many from one value, or too many into one block.
    """
    edges_into: Counter[int] = Counter()
    for crossing in crossed:
        # Values with many readers go to the rail anyway, so they give a block no edge.
        if not crossing.is_from_outside and len(crossing.readers) <= EDGES:
            edges_into.update(crossing.readers)
    crowded = {reader for reader, edges in edges_into.items() if edges > EDGES}
    railed = []
    for crossing in crossed:
        has_many_readers = len(crossing.readers) > EDGES
        reads_crowded = not crowded.isdisjoint(crossing.readers)
        is_crowded = reads_crowded and not crossing.is_from_outside
        if has_many_readers or is_crowded:
            railed.append(crossing)
    return railed


def _add_inputs(graph: Digraph, plan: BlockPlan, crossed: Sequence[Crossing]) -> None:
    for value in plan.inputs:
        graph.node(f"input_{value.name}", label=input_label(value), **OUTSIDE)
    for crossing in crossed:
        if crossing.source.startswith("value_"):
            label = edge_label(_value_names(crossing), INK)
            graph.node(crossing.source, label=label, style="rounded,dashed", **OUTSIDE)


def _add_blocks(graph: Digraph, columns: Columns, progress: Progress | None) -> None:
    plan = columns.plan
    for index, block in enumerate(plan.all_blocks):
        label = block_label(block, leaves_in(block, plan), progress)
        style = block_style(block, plan, progress)
        # Boxes of one group are set straight below each other.
        group = f"column_{columns.of(index)}"
        graph.node(block.target, label=label, group=group, **style)
        if block is not plan.classifier:
            add_head(graph, block, block.target, plan)


def _align_rows(graph: Digraph, columns: Columns) -> None:
    """Set the boxes of each row beside each other, where there are several columns.

    With 10 rows, row 0 holds the blocks 0, 10, 20 and so on.
    """
    blocks = columns.plan.all_blocks
    # A row whose only box is in the first column needs no alignment.
    in_other_columns = len(blocks) - columns.rows
    for first in range(min(columns.rows, in_other_columns)):
        with graph.subgraph() as row:
            row.attr(rank="same")
            for block in blocks[first :: columns.rows]:
                row.node(block.target)


def _add_cuts(graph: Digraph, columns: Columns) -> None:
    plan = columns.plan
    for index, (block, following) in enumerate(itertools.pairwise(plan.all_blocks)):
        style, style_from_sign = cut_styles(index, plan)
        if columns.of(index) == columns.of(index + 1):
            graph.edge(block.target, following.target, weight="100", **style)
            continue
        # A line to the top of the next column would run across the blocks.
        add_sign_to(graph, following)
        add_sign_from(graph, block)
        graph.edge(block.target, f"to_{following.target}", weight="100", **style)
        graph.edge(f"from_{block.target}", following.target, weight="100", **style_from_sign)


def _tops(columns: Columns) -> list[str]:
    """Return the node at the top of each column: the first block, then the "from" signs."""
    blocks = columns.plan.all_blocks
    tops = [blocks[0].target]
    for first in range(columns.rows, len(blocks), columns.rows):
        tops.append(f"from_{blocks[first - 1].target}")
    return tops


def _add_edges(graph: Digraph, crossing: Crossing, columns: Columns) -> None:
    """Add an edge from a value to each block that reads it."""
    names = edge_label(_value_names(crossing), _colour(crossing))
    for reader in crossing.readers:
        style = _edge_style(crossing)
        # The edge from an input to the first block needs no name: the box of the input has it.
        if not crossing.is_from_outside or reader > 0:
            style["label"] = names
        if not crossing.is_from_outside and columns.of(crossing.stage) != columns.of(reader):
            # Across columns an edge may lead upwards, so it must not push its reader down.
            style["constraint"] = "false"
        graph.edge(crossing.source, columns.plan.all_blocks[reader].target, **style)


def _add_rail(graph: Digraph, railed: Sequence[Crossing], columns: Columns) -> None:
    """Add a line along each column, with a stop beside each block that gives or reads a value."""
    with_stop: set[int] = set()
    for crossing in railed:
        with_stop.update(crossing.readers)
        if not crossing.is_from_outside:
            with_stop.add(crossing.stage)
    stops = sorted(with_stop)
    for stop in stops:
        _add_stop(graph, stop, railed, columns.plan)
    for crossing in railed:
        if crossing.is_from_outside:
            graph.edge(crossing.source, f"stop_{crossing.readers[0]}", **_edge_style(crossing))
    for stop, following in itertools.pairwise(stops):
        if columns.of(stop) == columns.of(following):
            graph.edge(f"stop_{stop}", f"stop_{following}", dir="none", weight="5", **RAIL)


def _add_stop(graph: Digraph, stop: int, railed: Sequence[Crossing], plan: BlockPlan) -> None:
    """Add a stop: the names of the values that a block gives to the rail and reads from it."""
    given = []
    read = []
    for crossing in railed:
        for name in _value_names(crossing):
            if crossing.stage == stop:
                given.append((f"+ {name}", _colour(crossing)))
            if stop in crossing.readers:
                read.append((name, _colour(crossing)))
    node = f"stop_{stop}"
    label = stop_label([*given, *read])
    graph.node(node, label=label, **{"class": "stop"}, **PLAIN_TEXT)
    # The rail is at the left of the blocks, and Graphviz sets the tail of an edge to the left. So
    # each edge starts at the rail, and has its arrow at the tail if the block gives a value.
    direction = "back" if given else "forward"
    if given and read:
        direction = "both"
    add_edge_in_row(graph, node, plan.all_blocks[stop].target, {**RAIL, "dir": direction})


def _value_names(crossing: Crossing) -> list[str]:
    return [f"{shorten(name, VALUE_WIDTH)}{crossing.in_brackets}" for name in crossing.names]


def _colour(crossing: Crossing) -> str:
    if crossing.is_from_outside:
        return INK
    return RED if crossing.detached else GREY


def _edge_style(crossing: Crossing) -> dict[str, str]:
    style = {"class": crossing.kind, "color": _colour(crossing)}
    if crossing.detached:
        style["style"] = "dotted"
    return style
