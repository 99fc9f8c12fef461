"""A block plan as a table in text or HTML. What crosses its cuts, and its notes, stand below."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from sffx.tables import Column, html_table, in_mib, text_table

if TYPE_CHECKING:
    from sffx.blocks import Block, BlockPlan, Leaf

_COLUMNS = (
    Column("block", "left"),
    Column("modules", "left"),
    Column("cut after", "left"),
    Column("output", "left"),
    Column("parameters"),
    Column("MACs"),
    Column("kept/sample"),
)


def plan_text(plan: BlockPlan) -> str:
    """Return a plan as lines of text, as `print` shows it."""
    rows = [_row(block) for block in plan.all_blocks]
    return "\n".join([_heading(plan), text_table(_COLUMNS, rows), *_remarks(plan)])


def plan_html(plan: BlockPlan) -> str:
    """Return a plan as HTML, as a notebook shows it."""
    rows = [_row(block) for block in plan.all_blocks]
    remarks = [f"<p>{escape(remark)}</p>" for remark in _remarks(plan)]
    return html_table(_COLUMNS, rows, caption=_heading(plan)) + "".join(remarks)


def blocks_in_words(plan: BlockPlan) -> str:
    """Return how many blocks a plan has: "9 feature blocks"."""
    return "1 feature block" if len(plan) == 1 else f"{len(plan)} feature blocks"


def leaf_in_words(leaf: Leaf) -> str:
    """Return which module was not traced, what it holds, and why."""
    share = f"{leaf.share:.0%} of the parameters"
    return f"{leaf.qualname} ({leaf.kind}, {share}): {leaf.reason}"


def _heading(plan: BlockPlan) -> str:
    outputs = plan.task.count_in_words(plan.num_classes)
    size = f"{blocks_in_words(plan)} and the classifier, {outputs}"
    return f"{plan.model}, policy {plan.policy!r}: {size}"


def _row(block: Block) -> tuple[str, ...]:
    return (
        block.target,
        block.name,
        ", ".join(output.name for output in block.outputs),
        "x".join(map(str, block.shape)),
        f"{block.num_parameters:,}",
        f"{block.macs:,}",
        in_mib(block.activation_bytes),
    )


def _remarks(plan: BlockPlan) -> list[str]:
    """Return the lines below the table: side values, modules that were not traced, notes."""
    remarks = []
    for block in plan.blocks:
        place = f"crosses the cut after {block.target}"
        normed = [output.name for output in block.beside]
        others = [name for name in block.sides if name not in normed]
        if normed:
            remarks.append(f"{place}, normed: {', '.join(normed)}")
        if others:
            remarks.append(f"{place}: {', '.join(others)}")
    for leaf in plan.leaves:
        remarks.append(f"not traced: {leaf_in_words(leaf)}")
    for note in plan.notes:
        remarks.append(f"note: {note}")
    return remarks
