"""Plans of one model by several policies, side by side: as a table and as columns of blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from sffx.blocks import Block, BlockPlan
from sffx.draw.fold import Run, fold
from sffx.draw.graph import new_graph
from sffx.draw.markup import cell, label, left_cell, line, line_break, row, table, text
from sffx.draw.render import PICTURES, TEXT, check_path, write_graph
from sffx.draw.style import BLUE, FAINT, NAME_WIDTH, PLAIN_TEXT
from sffx.draw.words import shape_in_words, shorten
from sffx.errors import InputError
from sffx.plan_table import blocks_in_words
from sffx.tables import Column, short_byte_size, short_number, text_table

if TYPE_CHECKING:
    from graphviz import Digraph

COLUMNS = (
    Column("policy", "left"),
    Column("feature blocks", "left"),
    Column("largest block", "left"),
    Column("kept/sample, largest", "left"),
    Column("kept/sample, all", "left"),
    Column("of it", "left"),
    Column("parameters, largest", "left"),
)

# Points of the bar of the block that keeps most, in any of the plans.
BAR_POINTS = 120

MEANING = "the bar: kept for backward, one sample; of each where a line stands for several blocks"


@dataclass(frozen=True)
class Figures:
    """What the blocks of a plan keep and hold, in words.

    Attributes:
        largest: the name of the block that keeps most activations for backward.
        kept: by that block, for one sample.
        kept_in_all: by all blocks.
        share: of the largest block in all.
        parameters: of the block that has most of them.
    """

    largest: str
    kept: str
    kept_in_all: str
    share: str
    parameters: str


def comparison(plans: Sequence[BlockPlan]) -> str:
    """Return a table with a line for each policy.

    It tells how many blocks a policy makes, and what the largest of them keeps and holds.

    Args:
        plans: of one model, by different policies.

    Returns:
        The text. "kept" are the activations for backward, as `Block.activation_bytes` counts them.
        "parameters, largest" is the number of parameters of the block that has most.

    Raises:
        InputError: there is no plan.
    """
    plans = _checked(plans)
    rows = []
    for plan in plans:
        figures = _figures(plan)
        rows.append(
            (
                plan.policy,
                str(len(plan)),
                figures.largest,
                figures.kept,
                figures.kept_in_all,
                figures.share,
                figures.parameters,
            )
        )
    outputs = plans[0].task.count_in_words(plans[0].num_classes)
    title = f"{plans[0].model}, {outputs}, by {len(plans)} policies"
    return f"{title}\n{text_table(COLUMNS, rows)}"


def draw_comparison(plans: Sequence[BlockPlan], path: str | os.PathLike[str]) -> Path:
    """Draw the blocks of each policy as a column, with a bar for what a block keeps.

    Blocks in a row that look alike are one line.

    Args:
        plans: of one model, by different policies.
        path: of the file, .svg, .png, .pdf or .dot.

    Returns:
        The path of the file, which is replaced as a whole.

    Raises:
        InputError: there is no plan, the suffix is unknown, or the folder does not exist.
        MissingExtra: there is no Graphviz to draw with.
    """
    plans = _checked(plans)
    return write_graph(check_path(path, (*PICTURES, *TEXT)), comparison_graph(plans))


def _checked(plans: Any) -> list[BlockPlan]:
    """Return plans as a list; raise an InputError if there are none, or something else."""
    hint = "Hint: pass [sffx.plan(model, policy=...), ...]"
    if isinstance(plans, BlockPlan) or not isinstance(plans, Sequence):
        raise InputError(f"plans is a {type(plans).__name__}, no list of plans. {hint}")
    if not plans:
        raise InputError(f"there is no plan to compare. {hint}")
    for plan in plans:
        if not isinstance(plan, BlockPlan):
            raise InputError(f"plans holds a {type(plan).__name__}, which is no plan. {hint}")
    return list(plans)


def comparison_graph(plans: Sequence[BlockPlan]) -> Digraph:
    """Return a graph with one node, "policies", in which the columns stand beside each other."""
    # Of all plans, so that bars and heights compare between the columns.
    most = 1
    lines = 0
    for plan in plans:
        most = max(most, *(block.activation_bytes for block in plan.all_blocks))
        lines = max(lines, len(fold(plan).all_blocks))
    columns = [cell(_column(plan, most, lines)) for plan in plans]

    graph = new_graph(f"{plans[0].model} by {len(plans)} policies")
    graph.attr(label=_title(plans[0], most), labelloc="t", labeljust="l")
    content = label(table([row(*columns)], CELLSPACING="12"))
    graph.node("policies", label=content, **PLAIN_TEXT)
    return graph


def _figures(plan: BlockPlan) -> Figures:
    blocks = plan.all_blocks
    largest = max(blocks, key=lambda block: block.activation_bytes)
    kept_in_all = sum(block.activation_bytes for block in blocks)
    return Figures(
        largest=largest.name,
        kept=short_byte_size(largest.activation_bytes),
        kept_in_all=short_byte_size(kept_in_all),
        share=f"{largest.activation_bytes / max(1, kept_in_all):.0%}",
        parameters=short_number(max(block.num_parameters for block in blocks)),
    )


def _title(plan: BlockPlan, most: int) -> str:
    scale = f"the longest bar is {short_byte_size(most)}"
    return label(
        text(plan.model, size=16),
        line_break(),
        # The height of a line of its own, or the small letters would touch the large ones.
        text(" ", size=4),
        Element("BR"),
        text(f"{MEANING}; {scale}", FAINT, 9),
        line_break(),
    )


def _column(plan: BlockPlan, most: int, lines: int) -> Element:
    """Return the blocks of a plan as a table with so many lines.

    Graphviz would stretch a shorter table to the height of the others.
    """
    figures = _figures(plan)
    largest = shorten(figures.largest, NAME_WIDTH)
    summary = (
        f"{blocks_in_words(plan)}; the largest, {largest}, "
        f"keeps {figures.kept} of {figures.kept_in_all}, {figures.share}"
    )
    rows = [
        line(text(plan.policy, size=13, bold=True), span=4),
        line(text(summary, FAINT, 9), span=4),
    ]
    blocks = fold(plan).all_blocks
    rows += [_block_row(block, most) for block in blocks]
    for _ in range(lines - len(blocks)):
        rows.append(line(text(" "), span=4))
    return table(rows, BORDER="1", CELLPADDING="3", COLOR=FAINT)


def _block_row(block: Block, most: int) -> Element:
    name = shorten(block.name, NAME_WIDTH)
    if isinstance(block, Run):
        name = f"{len(block.blocks)} × {name}"
    return row(
        left_cell(text(name)),
        left_cell(text(shape_in_words(block.shape), FAINT, 9)),
        left_cell(text(short_byte_size(block.activation_bytes), FAINT, 9)),
        left_cell(_bar(block.activation_bytes, most)),
    )


def _bar(size: int, most: int) -> Element:
    length = max(1, round(BAR_POINTS * size / most))
    bar = cell(FIXEDSIZE="TRUE", WIDTH=str(length), HEIGHT="8", BGCOLOR=BLUE)
    # The rest of the line is a cell of its own, or the bar would stand in the middle. It has a
    # width beside the longest bar as well.
    rest_length = BAR_POINTS + 1 - length
    rest = cell(FIXEDSIZE="TRUE", WIDTH=str(rest_length), HEIGHT="8")
    return table([row(bar, rest)], CELLPADDING="0")
