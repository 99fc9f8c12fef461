"""The labels of a drawing: the texts in its title, in boxes, on edges and in the footer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from xml.etree.ElementTree import Element

from sffx.blocks import Block, BlockPlan, Input, Leaf
from sffx.draw.detail import joins_in_words, module_names
from sffx.draw.fold import Run, relative
from sffx.draw.legend import entries
from sffx.draw.markup import cell, left_cell, line, row, rows_label, table, text
from sffx.draw.progress import ACCURACY_COLOURS, RATE_COLOURS, Progress, percent
from sffx.draw.style import (
    AMBER,
    BLUE,
    FAINT,
    LINE_WIDTH,
    MARK_POINTS,
    MODULE_WIDTH,
    NAME_POINTS,
    NOTE_WIDTH,
    TARGET_POINTS,
    TEAL,
)
from sffx.draw.words import (
    block_facts,
    head_in_words,
    heading,
    plan_facts,
    shape_in_words,
    shorten,
    shorten_block_name,
)
from sffx.parts import index_of
from sffx.plan_table import leaf_in_words

# A box names at most so many modules, in at most so many lines. An edge names so many values.
MODULES_SHOWN = 8
MODULE_LINES = 2
VALUES_SHOWN = 4

SMALL = 9


def title_label(plan: BlockPlan, progress: Progress | None = None) -> str:
    """Return the heading: the model, the policy, the total costs, and the accuracy of the net."""
    rows = [
        line(text(heading(plan), size=16, bold=True)),
        line(text(plan_facts(plan), FAINT)),
    ]
    if progress is not None and progress.summary():
        rows.append(line(text(progress.summary(), FAINT)))
    return rows_label([*rows, _gap()])


def input_label(value: Input) -> str:
    """Return the name of a model input, the shape of one sample, and its dtype."""
    kind = f"{shape_in_words(value.shape)} {value.dtype}"
    rows = [
        line(text(value.name, size=11, bold=True)),
        line(text(kind, FAINT, SMALL)),
    ]
    return rows_label(rows)


def block_label(
    block: Block, leaves: Sequence[Leaf], progress: Progress | None = None, *, contents: bool = True
) -> str:
    """Return the label of a block.

    Args:
        block: of the plan. It is named with its target, its shape and its costs.
        leaves: its modules that were not traced.
        progress: of its training; None shows none.
        contents: whether its modules and joins are named. Where they are drawn, they need no names.
    """
    rows = [_name_row(block)]
    if contents:
        for modules in _module_lines(block):
            rows.append(line(text(modules, FAINT, SMALL), span=2))
        joins = joins_in_words(block)
        if joins:
            rows.append(line(text(f"inside: {joins}", TEAL, SMALL), span=2))
    for leaf in leaves:
        name = shorten(relative(leaf.qualname, block), MODULE_WIDTH)
        rows.append(line(text(f"not traced: {name} ({leaf.kind})", AMBER, SMALL), span=2))
    each = "each " if isinstance(block, Run) else ""
    rows.append(line(text(each + block_facts(block)), span=2))
    if progress is not None:
        rows.append(_progress_row(block.target, progress))
    return rows_label(rows)


def head_label(block: Block, plan: BlockPlan) -> str:
    """Return the label of the head beside a block: the classes, and how it computes goodness."""
    rows = [line(text("goodness", BLUE, bold=True))]
    for words in head_in_words(block, plan):
        rows.append(line(text(words, BLUE, SMALL)))
    return rows_label(rows)


def edge_label(names: Sequence[str], colour: str) -> str:
    """Return the names of the values on an edge, one a line."""
    rows = []
    for name in _first_names(names):
        # The gap keeps the text off the line of the edge.
        rows.append(row(cell(WIDTH="5"), left_cell(text(name, colour, SMALL))))
    return rows_label(rows)


def stop_label(names: Sequence[tuple[str, str]]) -> str:
    """Return the values that a block takes from its rail or gives to it, each with its colour."""
    colour_of = dict(names)
    rows = []
    for name in _first_names([name for name, _ in names]):
        # "… 3 more" is no name, so it has no colour of its own.
        colour = colour_of.get(name, FAINT)
        rows.append(line(text(name, colour, SMALL)))
    return rows_label(rows)


def footer_label(plan: BlockPlan, kinds: Collection[str], progress: Progress | None = None) -> str:
    """Return the legend, and below it the leaves that were not traced and the notes of the plan.

    Args:
        plan: of the drawing.
        kinds: what the drawing contains besides blocks and cuts, by the kinds of the legend.
        progress: of a training; its colours are explained.
    """
    rows = [_gap()]
    for entry in entries(kinds, plan):
        rows.append(_sample_row(entry.mark, entry.colour, entry.meaning))
    if progress is not None:
        rows += _scale_rows(progress)
    for leaf in plan.leaves:
        rows += _paragraph("not traced", AMBER, leaf_in_words(leaf))
    for note in plan.notes:
        rows += _paragraph("note", FAINT, note)
    return rows_label(rows)


def _gap() -> Element:
    return row(cell(HEIGHT="8"))


def _name_row(block: Block) -> Element:
    name = shorten_block_name(block.name)
    target = block.target
    if isinstance(block, Run):
        last = index_of(block.blocks[-1].target)
        name = f"{len(block.blocks)} × {name}"
        target = f"{target} … {last}"
    return row(
        left_cell(text(name, size=12, bold=True), WIDTH=str(NAME_POINTS)),
        cell(text(target, FAINT, SMALL), ALIGN="RIGHT", WIDTH=str(TARGET_POINTS)),
    )


def _progress_row(target: str, progress: Progress) -> Element:
    accuracy = text("no accuracy", FAINT)
    if target in progress.accuracy:
        accuracy = text(f"accuracy {percent(progress.accuracy[target])}", bold=True)
    accuracy_cell = left_cell(accuracy, WIDTH="150")
    if target in progress.rates:
        rate = text(f"learning rate {progress.rates[target]:.1e}")
        colour = progress.rate_colour(target)
        rate_cell = left_cell(rate, CELLPADDING="3", BGCOLOR=colour)
    else:
        rate_cell = left_cell(text("no learning rate", FAINT), CELLPADDING="3")
    return line(table([row(accuracy_cell, rate_cell)], CELLPADDING="0"), span=2)


def _scale_rows(progress: Progress) -> list[Element]:
    """Return the colours of accuracies and of learning rates, each with its lowest and highest."""
    accuracies = list(filter(math.isfinite, progress.of_blocks.values()))
    rates = list(filter(math.isfinite, progress.rates.values()))
    rows = []
    if accuracies:
        ends = (percent(min(accuracies)), percent(max(accuracies)))
        rows.append(_scale_row("box", "accuracy", ACCURACY_COLOURS, ends))
    if rates:
        ends = (f"{min(rates):.1e}", f"{max(rates):.1e}")
        rows.append(_scale_row("inset", "learning rate", RATE_COLOURS, ends))
    return rows


def _scale_row(mark: str, name: str, colours: tuple[str, str], ends: tuple[str, str]) -> Element:
    cells = [cell(text(f"{name}, lowest and highest", FAINT, SMALL))]
    for colour, end in zip(colours, ends, strict=True):
        cells.append(cell(text(end, size=SMALL), BGCOLOR=colour))
    scale = table([row(*cells)], CELLPADDING="3")
    return row(_mark_cell(mark, FAINT), left_cell(scale))


def _sample_row(mark: str, colour: str, meaning: str) -> Element:
    return row(_mark_cell(mark, colour), left_cell(text(meaning, FAINT, SMALL)))


def _mark_cell(mark: str, colour: str) -> Element:
    return left_cell(text(mark, colour, SMALL), WIDTH=str(MARK_POINTS))


def _paragraph(mark: str, colour: str, words: str) -> list[Element]:
    """Return a long text in several rows, with a mark before the first one."""
    # Graphviz breaks no lines in a cell, so each line is a row.
    first, *others = textwrap.wrap(words, NOTE_WIDTH) or [" "]
    rows = [_sample_row(mark, colour, first)]
    for part in others:
        rows.append(_sample_row(" ", colour, part))
    return rows


def _module_lines(block: Block) -> list[str]:
    """Return the lines that name the modules of a block, as deep as there is room for.

    For example "conv1 · relu ×2", or "mlp (5)" for a module with five leaves.
    """
    paths = []
    names = module_names(block)
    for qualname in names:
        # A block that is a single layer has its name already, but not how often it is called.
        if qualname != block.name or names.count(qualname) > 1:
            paths.append(relative(qualname, block).split("."))
    deepest = max(map(len, paths), default=0)
    items: list[str] = []
    # Deeper names say more but need more room. So the depth shrinks until the names fit.
    for depth in range(deepest, 0, -1):
        items = _modules_at(depth, paths)
        lines = _lines(items)
        if len(items) <= MODULES_SHOWN and len(lines) <= MODULE_LINES:
            return lines
    if len(items) > MODULES_SHOWN:
        # The first and the last modules show how the block begins and ends. These seven and the
        # words between them are as many items as a box has room for.
        items = [*items[:4], f"… {len(items) - 7} more …", *items[-3:]]
    return _lines(items)


def _modules_at(depth: int, paths: Sequence[Sequence[str]]) -> list[str]:
    """Return the modules down to a depth, each with the number of its leaves or of its calls.

    Of the paths attn.qkv, attn.proj, relu and relu, depth 1 gives "attn (2)" and "relu ×2".
    """
    calls_by_module: dict[str, list[str]] = {}
    for path in paths:
        module = ".".join(path[:depth])
        leaf = ".".join(path)
        calls_by_module.setdefault(module, []).append(leaf)
    items = []
    for module, calls in calls_by_module.items():
        leaves = len(set(calls))
        if leaves > 1:
            items.append(f"{shorten(module, MODULE_WIDTH)} ({leaves})")
        elif len(calls) > 1:
            items.append(f"{shorten(calls[0], MODULE_WIDTH)} ×{len(calls)}")
        else:
            items.append(shorten(calls[0], MODULE_WIDTH))
    return items


def _lines(items: Sequence[str]) -> list[str]:
    """Return items joined by " · " and broken into lines."""
    # Not textwrap: it would break inside "relu ×2".
    lines: list[str] = []
    for item in items:
        joined = f"{lines[-1]} · {item}" if lines else ""
        if joined and len(joined) <= LINE_WIDTH:
            lines[-1] = joined
        else:
            lines.append(item)
    return lines


def _first_names(names: Sequence[str]) -> list[str]:
    if len(names) <= VALUES_SHOWN:
        return list(names)
    shown = names[: VALUES_SHOWN - 1]
    return [*shown, f"… {len(names) - len(shown)} more"]
