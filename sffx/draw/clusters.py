"""The graph of a plan with the inside of every block: a frame around its modules or nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sffx.blocks import Block, BlockPlan
from sffx.draw.crossings import crossings, is_read_by_next, outside_node, side_kinds
from sffx.draw.detail import JOIN_SIGNS, Part, parts
from sffx.draw.fold import Run, first_of, fold, leaves_in
from sffx.draw.graph import (
    INVISIBLE,
    OUTSIDE,
    add_head,
    add_sign_from,
    add_sign_to,
    block_style,
    cut_styles,
    literal,
    new_graph,
    order_columns,
)
from sffx.draw.labels import block_label, footer_label, input_label, title_label
from sffx.draw.progress import Progress
from sffx.draw.style import FAINT, GREY, INK, NAME_WIDTH, PLAIN_TEXT, RED, TEAL
from sffx.draw.words import heading, shorten

if TYPE_CHECKING:
    from graphviz import Digraph

# Rows in one column. A taller graph goes on at the top of the next column.
ROWS = 80
# Rows that the heading of a block and its frame take.
HEADING_ROWS = 3

# A dense block has hundreds of edges, which no reader can follow and Graphviz takes minutes to lay
# out. So a node that reads more values than this has the last edge only, and its tooltip names all.
EDGES = 6

PART = {
    "class": "part",
    "style": "rounded,filled",
    "fillcolor": "white",
    "color": GREY,
    "margin": "0.08,0.03",
    "height": "0.2",
    "fontsize": "9",
}
JOIN = {
    "class": "part join",
    "style": "rounded,filled",
    "fillcolor": "#dff1f3",
    "color": TEAL,
    "margin": "0.1,0.03",
    "height": "0.2",
    "fontsize": "10",
}
# Sizes, positions and masks, which the block does not learn from.
ASIDE = {
    "class": "part aside",
    "style": "rounded,dashed",
    "color": FAINT,
    "fontcolor": FAINT,
    "margin": "0.08,0.03",
    "height": "0.2",
    "fontsize": "8",
}
INNER_EDGE = {"class": "inner", "color": GREY}
INNER_ASIDE_EDGE = {
    "class": "inner aside",
    "color": FAINT,
    "style": "dashed",
    "arrowsize": "0.5",
}
INPUT_EDGE = {"class": "input", "color": INK}
SIDE_EDGE = {"class": "side", "color": GREY}
DETACHED_EDGE = {"class": "side detached", "color": RED, "style": "dotted"}


@dataclass(frozen=True)
class Place:
    """Where in the drawing a value comes from.

    Attributes:
        node: the name of its node.
        stage: index of the block that computes it, -1 for a value from outside.
        is_cut: whether it carries a gradient, which the cut after the block stops.
        is_path: whether blocks learn from it.
    """

    node: str
    stage: int
    is_cut: bool
    is_path: bool


@dataclass(frozen=True)
class Drawing:
    """A plan with the insides of its blocks, set in columns.

    Attributes:
        plan: as it is drawn, folded or not.
        insides: the parts of each block, the classifier's last.
        columns: the column that each block stands in.
        places: where each value comes from, by its name.
    """

    plan: BlockPlan
    insides: list[list[Part]]
    columns: list[int]
    places: dict[str, Place]

    def turns_before(self, index: int) -> bool:
        """Return whether a block stands at the top of a column, behind the end of another one."""
        return index > 0 and self.columns[index] != self.columns[index - 1]

    def place(self, value: str) -> Place:
        """Return where a value comes from, in a block or outside of all."""
        return self.places.get(value) or Place(outside_node(value, self.plan), -1, False, True)


def detailed_graph(
    plan: BlockPlan, detail: str, *, unfold: bool = False, progress: Progress | None = None
) -> Digraph:
    """Return the graph of a plan with the graph inside each block.

    A block is the cluster "cluster_block_3". Its heading is the node "block_3", which stands for
    the value that enters the block. Its parts are nodes such as "block_3/conv1".

    Args:
        plan: of the model, as `sffx.plan` returns it.
        detail: "modules", the modules of each block and its joins, or "nodes", all its nodes.
        unfold: whether blocks in a row that look alike are drawn one by one. By default the first
            of them stands for all.
        progress: of a training, by which the blocks are coloured; then no block is folded.

    Raises:
        MissingExtra: the package graphviz is not installed.
    """
    is_folded = not unfold and progress is None
    drawn = fold(plan) if is_folded else plan
    insides = [parts(block, detail) for block in drawn.all_blocks]
    drawing = Drawing(drawn, insides, _columns(insides), _places(drawn, insides))

    graph = new_graph(heading(plan))
    graph.attr(label=footer_label(drawn, _kinds(drawing), progress))
    with graph.subgraph(name="cluster_plan") as inner:
        title = title_label(plan, progress)
        inner.attr(label=title, labelloc="t", margin="0", peripheries="0")
        _order_columns(inner, drawing)
        for column in dict.fromkeys(drawing.columns):
            _add_column(inner, column, drawing, progress)
        for index in range(len(insides)):
            _add_entry(inner, index, drawing)
            _add_reads(inner, index, drawing)
    return graph


def _kinds(drawing: Drawing) -> set[str]:
    """Return what the drawing contains besides blocks and cuts, by the kinds of the legend."""
    kinds = side_kinds(crossings(drawing.plan))
    if any(isinstance(block, Run) for block in drawing.plan):
        kinds.add("thick")
    for part in itertools.chain(*drawing.insides):
        if len(part.node.reads) > EDGES:
            kinds.add("wide")
    return kinds


def _columns(insides: Sequence[Sequence[Part]]) -> list[int]:
    """Return the column that each block stands in, so that all columns are about as tall."""
    heights = [len(inside) + HEADING_ROWS for inside in insides]
    total = sum(heights)
    count = math.ceil(total / ROWS)
    columns = []
    top = 0
    # As if all blocks stood in one column, which is then divided into equal lengths. A block is not
    # divided: it belongs where its middle lies.
    for height in heights:
        middle = top + height // 2
        columns.append(min(count - 1, middle * count // total))
        top += height
    return columns


def _places(plan: BlockPlan, insides: Sequence[Sequence[Part]]) -> dict[str, Place]:
    """Return where the values of all parts come from, by the values' names."""
    places = {}
    for stage, block in enumerate(plan.all_blocks):
        first = first_of(block)
        for part in insides[stage]:
            name = part.node.name
            is_output = name == first.output
            is_cut = is_output or name in first.detached
            place = Place(_node(block, name), stage, is_cut, part.node.is_path)
            places[name] = place
            if is_output:
                # The value that leaves a run is that of its last block.
                places[block.output] = place
    return places


def _node(block: Block, value: str) -> str:
    """Return the node of a part in the drawing, "block_3/conv1"."""
    return f"{block.target}/{value}"


def _add_column(graph: Digraph, column: int, drawing: Drawing, progress: Progress | None) -> None:
    # Graphviz sets a cluster apart from all else, which keeps the columns beside each other.
    with graph.subgraph(name=f"cluster_column_{column}") as inner:
        inner.attr(label="")
        if column == 0:
            # Graphviz sets the column that has the inputs at the left.
            for value in drawing.plan.inputs:
                inner.node(f"input_{value.name}", label=input_label(value), **OUTSIDE)
        for index, own in enumerate(drawing.columns):
            if own == column:
                _add_turns(inner, index, drawing)
                _add_cluster(inner, index, drawing, progress)


def _add_turns(graph: Digraph, index: int, drawing: Drawing) -> None:
    """Add the signs at the end of a column and at the top of the next one, where a cut turns.

    A line from one to the other would run across the blocks.
    """
    blocks = drawing.plan.all_blocks
    if drawing.turns_before(index):
        add_sign_from(graph, blocks[index - 1])
    if index + 1 < len(blocks) and drawing.turns_before(index + 1):
        add_sign_to(graph, blocks[index + 1])


def _add_cluster(graph: Digraph, index: int, drawing: Drawing, progress: Progress | None) -> None:
    """Add the frame of a block, its heading, its parts, and the head beside its output."""
    plan = drawing.plan
    block = plan.all_blocks[index]
    style = block_style(block, plan, progress)
    # A cluster inherits the attributes of the one around it, so all of them are set. It has one
    # line around it at most: the line of a run is a thick one.
    frame = {"style": "rounded,filled", "margin": "8", "peripheries": "1"}
    width = "3" if isinstance(block, Run) else "1"
    with graph.subgraph(name=f"cluster_{block.target}") as cluster:
        cluster.attr("graph", label="", penwidth=width, **{**style, **frame})
        label = block_label(block, leaves_in(block, plan), progress, contents=False)
        plain = {**style, **PLAIN_TEXT, "peripheries": "0"}
        cluster.node(block.target, label=label, **plain)
        for part in drawing.insides[index]:
            _add_part(cluster, part, block)
    if block is not plan.classifier:
        add_head(graph, block, _node(block, first_of(block).output), plan)


def _add_part(graph: Digraph, part: Part, block: Block) -> None:
    node = part.node
    label = shorten(part.text, NAME_WIDTH)
    if len(node.reads) > EDGES:
        label = f"{label} of {len(node.reads)}"
    tooltip = f"{node.name}: {node.call} of {', '.join(node.reads)}"
    graph.node(
        _node(block, node.name),
        label=literal(label),
        tooltip=literal(tooltip),
        **_part_style(part),
    )


def _part_style(part: Part) -> dict[str, str]:
    if part.node.join in JOIN_SIGNS:
        return JOIN
    return PART if part.node.is_path else ASIDE


def _add_entry(graph: Digraph, index: int, drawing: Drawing) -> None:
    """Add the edge to the heading of a block, from the block before or from elsewhere."""
    plan = drawing.plan
    target = plan.all_blocks[index].target
    if index == 0 or not is_read_by_next(index - 1, plan):
        # Nothing enters over the cut. So the edge comes from an input, or from an earlier block.
        entering = _entering_value(index, plan)
        if entering:
            _add_read(graph, target, index, drawing.place(entering), drawing)
    if index == 0:
        return
    # The edge of the cut or, where nothing enters over it, a line that keeps the blocks in order.
    before = plan.blocks[index - 1]
    output = _node(before, first_of(before).output)
    style, style_from_sign = cut_styles(index - 1, plan)
    if not drawing.turns_before(index):
        graph.edge(output, target, weight="20", **style)
        return
    graph.edge(output, f"to_{target}", weight="20", **style)
    graph.edge(f"from_{before.target}", target, weight="20", **style_from_sign)


def _entering_value(index: int, plan: BlockPlan) -> str:
    """Return the value that the heading of a block stands for.

    It is the output of the block before. If the block does not read that, it is the only value that
    the block reads; "" if it reads several.
    """
    if index > 0 and is_read_by_next(index - 1, plan):
        return plan.blocks[index - 1].output
    values = set(plan.all_blocks[index].inputs)
    return values.pop() if len(values) == 1 else ""


def _add_reads(graph: Digraph, index: int, drawing: Drawing) -> None:
    """Add the edges to the parts of a block."""
    block = drawing.plan.all_blocks[index]
    entering = _entering_value(index, drawing.plan)
    own = {part.node.name for part in drawing.insides[index]}
    for part in drawing.insides[index]:
        node = _node(block, part.node.name)
        reads = part.node.reads
        if own.isdisjoint(reads) and entering not in reads:
            # A part that reads nothing of the block stands below the heading all the same.
            graph.edge(block.target, node, **INVISIBLE)
        shown = reads if len(reads) <= EDGES else reads[-1:]
        for read in shown:
            if read == entering:
                style = INNER_EDGE if part.node.is_path else INNER_ASIDE_EDGE
                graph.edge(block.target, node, **style)
            else:
                _add_read(graph, node, index, drawing.place(read), drawing)


def _add_read(graph: Digraph, node: str, index: int, source: Place, drawing: Drawing) -> None:
    """Add the edge from a value to a node in the block of an index."""
    style = dict(_read_style(source, index))
    if source.stage >= 0 and drawing.columns[source.stage] != drawing.columns[index]:
        # Across columns an edge may lead upwards, so it must not push its reader down.
        style["constraint"] = "false"
    graph.edge(source.node, node, **style)


def _read_style(source: Place, index: int) -> dict[str, str]:
    if source.stage < 0:
        return INPUT_EDGE
    if source.stage == index:
        return INNER_EDGE if source.is_path else INNER_ASIDE_EDGE
    return DETACHED_EDGE if source.is_cut else SIDE_EDGE


def _order_columns(graph: Digraph, drawing: Drawing) -> None:
    """Set the columns from left to right, with their first blocks beside each other."""
    blocks = drawing.plan.all_blocks
    firsts = [drawing.columns.index(column) for column in dict.fromkeys(drawing.columns)]
    tops = [blocks[0].target]
    for index in firsts[1:]:
        # The sign where the cut comes in stands above the first block.
        tops.append(f"from_{blocks[index - 1].target}")
    order_columns(graph, tops)
    with graph.subgraph() as row:
        row.attr(rank="same")
        for index in firsts:
            row.node(blocks[index].target)
