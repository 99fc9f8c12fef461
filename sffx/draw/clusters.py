"""A block plan as a Graphviz graph that shows the inside of every block: a cluster of its modules or nodes, and who reads whom."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sffx.blocks import Block, BlockPlan
from sffx.draw.fold import Run, first_of, fold
from sffx.draw.graph import DEFAULTS, OUTSIDE, beside, edge, head_beside, look, node, outside, quote
from sffx.draw.inner import JOIN_SIGNS, Part, parts
from sffx.draw.label import (
    FAINT,
    GREY,
    INK,
    NAME_WIDTH,
    RED,
    TEAL,
    cut_in_words,
    edge_label,
    footer_label,
    input_label,
    shorten,
    title_label,
)
from sffx.draw.progress import Progress

# Rows in one column, of which a block's heading and its frame take three; a taller graph goes on at the top of the next column.
ROWS = 80
HEADING_ROWS = 3

# Of a node that reads more values than this only the last edge is drawn, and its tooltip names them all: a dense block has hundreds of
# edges, which no reader can follow and Graphviz takes minutes to lay out.
EDGES = 6

PART = f'class="part", style="rounded,filled", fillcolor="white", color="{GREY}", margin="0.08,0.03", height=0.2, fontsize=9'
JOIN = f'class="part join", style="rounded,filled", fillcolor="#dff1f3", color="{TEAL}", margin="0.1,0.03", height=0.2, fontsize=10'
# What is no path: sizes, positions, masks.
ASIDE = f'class="part aside", style="rounded,dashed", color="{FAINT}", fontcolor="{FAINT}", margin="0.08,0.03", height=0.2, fontsize=8'
INNER = f'class="inner", color="{GREY}"'
INNER_ASIDE = f'class="inner aside", color="{FAINT}", style="dashed", arrowsize=0.5'


@dataclass(frozen=True)
class Place:
    """Where in the drawing a value comes from.

    Attributes:
        node: the name of its node.
        stage: index of the block that computes it, -1 for what comes from outside.
        is_cut: whether it carries a gradient, which the cut after the block stops.
        is_path: whether blocks learn from it.
    """

    node: str
    stage: int
    is_cut: bool
    is_path: bool


def clusters_dot(
    plan: BlockPlan, detail: str, *, unfold: bool = False, progress: Progress | None = None
) -> str:
    """DOT text of the block graph with the graph inside each block.

    Args:
        plan: of the model, as `sffx.plan` returns it.
        detail: "modules", the modules of each block and the places where paths meet, or "nodes", all nodes of its graph.
        unfold: whether blocks in a row that look alike are drawn one by one, not the first of them for all.
        progress: of a training, by which the blocks are coloured; then none of them are drawn as one.

    Returns:
        the text of a directed graph. A block is the cluster "cluster_block_3"; its heading is the node "block_3", which stands for the
        value that enters it, and its parts are nodes such as "block_3/conv1".
    """
    whole, plan = plan, plan if unfold or progress else fold(plan)
    inside = [parts(block, detail) for block in plan.all_blocks]
    places = _places(plan, inside)
    columns = _columns(inside)
    shown = {"thick"} if any(isinstance(block, Run) for block in plan) else set()
    shown |= {"side"} if any(set(block.sides) - set(block.detached) for block in plan) else set()
    shown |= {"detached"} if any(block.detached for block in plan) else set()
    shown |= (
        {"wide"}
        if any(len(part.node.reads) > EDGES for block in inside for part in block)
        else set()
    )
    lines = [
        *DEFAULTS,
        f"label={footer_label(plan, shown, progress)}",
        "subgraph cluster_plan {",
        f'label={title_label(whole, progress)}; labelloc="t"; margin=0; peripheries=0',
    ]
    for column, group in itertools.groupby(range(len(inside)), key=columns.__getitem__):
        # What is in a cluster is set apart from what is not, which keeps the columns beside each other.
        lines += [f'subgraph cluster_column_{column} {{ label=""']
        # Graphviz sets the column that has the inputs at the left.
        lines += [
            node(f"input_{value.name}", f"{OUTSIDE}, label={input_label(value)}")
            for value in plan.inputs
            if not column
        ]
        for index in group:
            lines += [
                *_turns(index, plan, columns),
                *_cluster(plan.all_blocks[index], inside[index], plan, progress),
            ]
        lines += ["}"]
    for index in range(len(inside)):
        lines += _entries(index, plan, columns)
        lines += _reads(index, inside[index], places, columns, plan)
    lines += _tops(plan, columns)
    return "digraph {\n" + "".join(f"  {line}\n" for line in [*lines, "}"]) + "}\n"


def _columns(inside: list[list[Part]]) -> list[int]:
    """The column that each block stands in, so that all are about as tall."""
    heights = [len(block) + HEADING_ROWS for block in inside]
    count = -(-sum(heights) // ROWS)
    columns, reached = [], 0
    for height in heights:
        columns.append(min(count - 1, (reached + height // 2) * count // sum(heights)))
        reached += height
    return columns


def _name(block: Block, value: str) -> str:
    return f"{block.target}/{value}"


def _places(plan: BlockPlan, inside: list[list[Part]]) -> dict[str, Place]:
    places = {}
    for stage, block in enumerate(plan.all_blocks):
        first = first_of(block)
        for part in inside[stage]:
            name, is_output = part.node.name, part.node.name == first.output
            places[name] = Place(
                _name(block, name), stage, is_output or name in first.detached, part.node.is_path
            )
            # The value that leaves a run is that of its last block.
            places[block.output if is_output else name] = places[name]
    return places


def _cluster(
    block: Block, inside: list[Part], plan: BlockPlan, progress: Progress | None
) -> Iterator[str]:
    """A frame with the heading of the block, which stands for the value that enters it, and its parts."""
    attributes = look(block, plan, progress, contents=False)
    yield f"subgraph {quote(f'cluster_{block.target}')} {{"
    # A cluster inherits what the one around it has, and has one line around it at most: that of a run is a thick one.
    width = 3 if isinstance(block, Run) else 1
    yield f'graph [{attributes}, label="", style="rounded,filled", margin=8, peripheries=1, penwidth={width}]'
    yield node(block.target, f'{attributes}, shape="plain", style="", peripheries=0')
    for part in inside:
        style = JOIN if part.node.join in JOIN_SIGNS else PART if part.node.is_path else ASIDE
        reads = part.node.reads
        text = (
            f"{shorten(part.text, NAME_WIDTH)}{f' of {len(reads)}' if len(reads) > EDGES else ''}"
        )
        told = f"label={quote(text)}, tooltip={quote(f'{part.node.name}: {part.node.call} of ' + ', '.join(reads))}"
        yield node(_name(block, part.node.name), f"{style}, {told}")
    yield "}"
    if block is not plan.classifier:
        yield from head_beside(block, _name(block, first_of(block).output), plan)


def _entering(index: int, plan: BlockPlan) -> str:
    """The value that the heading of a block stands for: the output before, or the model's only input; "" where there are several."""
    if index:
        return plan.blocks[index - 1].output
    outer = set(plan.blocks[0].inputs)
    return outer.pop() if len(outer) == 1 else ""


def _entries(index: int, plan: BlockPlan, columns: list[int]) -> Iterator[str]:
    """The edge to the heading of a block, from the block before or from the input."""
    target = plan.all_blocks[index].target
    if not index:
        name = _entering(0, plan)
        yield from (
            [edge(outside(name, plan), target, f'class="input", color="{INK}"')] if name else ()
        )
        return
    before = plan.blocks[index - 1]
    name = _name(before, first_of(before).output)
    style = f'class="cut", color="{RED}", style="dashed", penwidth=1.6, weight=20'
    cut = f"{style}, label={edge_label([cut_in_words(plan.options)], RED)}"
    if columns[index] == columns[index - 1]:
        yield edge(name, target, cut)
        return
    yield edge(name, f"to_{target}", cut)
    yield edge(f"from_{before.target}", target, style.replace("cut", "cut turn"))


def _turns(index: int, plan: BlockPlan, columns: list[int]) -> Iterator[str]:
    """The signs at the end of a column, where the cut leads to the next one, and at the top of that: a line would run across the blocks."""
    stages = plan.all_blocks
    look = f'class="turn", shape="plain", style="", fontcolor="{RED}", fontsize=9'
    if index and columns[index] != columns[index - 1]:
        yield node(
            f"from_{stages[index - 1].target}",
            f"{look}, label={quote(f'from {stages[index - 1].target}')}",
        )
    if index + 1 < len(stages) and columns[index] != columns[index + 1]:
        yield node(
            f"to_{stages[index + 1].target}",
            f"{look}, label={quote(f'to {stages[index + 1].target}')}",
        )


def _reads(
    index: int, inside: list[Part], places: dict[str, Place], columns: list[int], plan: BlockPlan
) -> Iterator[str]:
    """The edges to the parts of a block; what reads nothing of the block stands below the heading all the same."""
    block, entering = plan.all_blocks[index], _entering(index, plan)
    own = {part.node.name for part in inside}
    for part in inside:
        name = _name(block, part.node.name)
        if not own & set(part.node.reads) and entering not in part.node.reads:
            yield edge(block.target, name, 'style="invis"')
        for read in part.node.reads if len(part.node.reads) <= EDGES else part.node.reads[-1:]:
            if read == entering:
                yield edge(block.target, name, INNER if part.node.is_path else INNER_ASIDE)
                continue
            place = places.get(read) or Place(outside(read, plan), -1, False, True)
            turn = (
                ", constraint=false"
                if place.stage >= 0 and columns[place.stage] != columns[index]
                else ""
            )
            yield edge(place.node, name, _style(place, index) + turn)


def _style(place: Place, index: int) -> str:
    if place.stage < 0:
        return f'class="input", color="{INK}"'
    if place.stage == index:
        return INNER if place.is_path else INNER_ASIDE
    return (
        f'class="side detached", color="{RED}", style="dotted"'
        if place.is_cut
        else f'class="side", color="{GREY}"'
    )


def _tops(plan: BlockPlan, columns: list[int]) -> Iterator[str]:
    """What sets the first blocks of the columns in one row, in their order."""
    tops = [plan.all_blocks[columns.index(column)].target for column in dict.fromkeys(columns)]
    if len(tops) > 1:
        yield beside(" -> ".join(map(quote, tops)) + ' [style="invis"]')
