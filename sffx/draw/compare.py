"""Plans of one model by several policies, side by side: as a table and as columns of blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sffx.blocks import Block, BlockPlan
from sffx.draw.fold import Run, fold
from sffx.draw.graph import DEFAULTS
from sffx.draw.label import (
    BLUE,
    FAINT,
    NAME_WIDTH,
    blocks_in_words,
    count,
    escape,
    memory,
    shape_text,
    shorten,
)
from sffx.draw.render import PICTURES, TEXT, check_path, write_graph
from sffx.errors import InputError

HEADER = (
    "policy",
    "feature blocks",
    "largest block",
    "kept/sample, largest",
    "kept/sample, all",
    "of it",
    "parameters, largest",
)

# Points of the bar of the block that keeps most, in any of the plans.
BAR_POINTS = 120


def comparison(plans: Sequence[BlockPlan]) -> str:
    """A table with a line for each policy: how many blocks it makes, and what the largest of them keeps and holds.

    Args:
        plans: of one model, by different policies.

    Returns:
        the text. "kept" are the activations for backward, as `Block.activation_bytes` counts them; "parameters, largest" is the number of
        parameters of the block that has most.
    """
    rows = [HEADER, *(_figures(plan) for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(
        [f"{plans[0].model}, {plans[0].num_classes} classes, by {len(plans)} policies", *lines]
    )


def draw_comparison(plans: Sequence[BlockPlan], path: str | os.PathLike[str]) -> Path:
    """Draws the blocks of each policy as a column, with a bar for what a block keeps; blocks in a row that look alike are one line.

    Args:
        plans: of one model, by different policies.
        path: of the file, .svg, .png, .pdf or .dot.

    Returns:
        the path that was written; the file is replaced as a whole.

    Raises:
        InputError: there is no plan, the suffix is unknown, or the folder does not exist.
        MissingExtra: there is no Graphviz to draw with.
    """
    if not plans:
        raise InputError(
            "there is no plan to compare. Hint: pass [sffx.plan(model, policy=...), ...]"
        )
    return write_graph(check_path(path, (*PICTURES, *TEXT)), comparison_dot(plans))


def comparison_dot(plans: Sequence[BlockPlan]) -> str:
    """DOT text with one node, "policies", in which the columns of the plans stand beside each other, their tops in line."""
    most = max(stage.activation_bytes for plan in plans for stage in plan.all_blocks)
    lines = max(len(fold(plan).all_blocks) for plan in plans)
    columns = "".join(f"<TD>{_column(plan, most, lines)}</TD>" for plan in plans)
    meaning = (
        "kept for backward, one sample: the bar; of each where a line stands for several blocks"
    )
    # The height of a line of its own, or the small letters would touch the large ones.
    title = f"<{_font(plans[0].model, size=16)}<BR ALIGN='LEFT'/>{_font(' ', size=4)}<BR/>{_font(meaning, FAINT, 9)}<BR ALIGN='LEFT'/>>"
    row = f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="12"><TR>{columns}</TR></TABLE>>'
    parts = [
        *DEFAULTS,
        f'label={title}; labelloc="t"; labeljust="l"',
        f'policies [shape="plain", style="", label={row}]',
    ]
    return "digraph {\n" + "".join(f"  {part}\n" for part in parts) + "}\n"


def _figures(plan: BlockPlan) -> tuple[str, ...]:
    stages = plan.all_blocks
    largest = max(stages, key=lambda stage: stage.activation_bytes)
    whole = sum(stage.activation_bytes for stage in stages)
    kept = (
        memory(largest.activation_bytes),
        memory(whole),
        f"{largest.activation_bytes / max(1, whole):.0%}",
    )
    return (
        plan.policy,
        str(len(plan)),
        largest.name,
        *kept,
        count(max(stage.num_parameters for stage in stages)),
    )


def _column(plan: BlockPlan, most: int, lines: int) -> str:
    """A table of a plan with so many lines, since Graphviz would stretch a shorter one to the height of the others."""
    _, _, largest, kept, whole, share, _ = _figures(plan)
    told = f"{blocks_in_words(plan)}; the largest, {shorten(largest, NAME_WIDTH)}, keeps {kept} of {whole}, {share}"
    rows = [_wide(f"<B>{_font(plan.policy, size=13)}</B>"), _wide(_font(told, FAINT, 9))]
    rows += [_line(block, most) for block in fold(plan).all_blocks]
    rows += [_wide(_font(" "))] * (lines - len(fold(plan).all_blocks))
    return f'<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="3" COLOR="{FAINT}">{"".join(rows)}</TABLE>'


def _line(block: Block, most: int) -> str:
    times = f"{len(block.blocks)} × " if isinstance(block, Run) else ""
    width = max(1, round(BAR_POINTS * block.activation_bytes / max(1, most)))
    # The rest of the line as a cell of its own, or the bar would stand in the middle.
    cell = f'<TD FIXEDSIZE="TRUE" WIDTH="{width}" HEIGHT="8" BGCOLOR="{BLUE}"></TD>'
    cell += f'<TD FIXEDSIZE="TRUE" WIDTH="{BAR_POINTS + 1 - width}" HEIGHT="8"></TD>'
    bar = (
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR>{cell}</TR></TABLE>'
    )
    name = _font(times + shorten(block.name, NAME_WIDTH))
    cells = (
        name,
        _font(shape_text(block.shape), FAINT, 9),
        _font(memory(block.activation_bytes), FAINT, 9),
        bar,
    )
    return "<TR>" + "".join(f'<TD ALIGN="LEFT">{cell}</TD>' for cell in cells) + "</TR>"


def _wide(text: str) -> str:
    return f'<TR><TD ALIGN="LEFT" COLSPAN="4">{text}</TD></TR>'


def _font(text: str, colour: str = "#1f2933", size: int = 10) -> str:
    return f'<FONT COLOR="{colour}" POINT-SIZE="{size}">{escape(text)}</FONT>'
