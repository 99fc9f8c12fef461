"""What is written in a drawing: Graphviz HTML-like labels, escaped, with names and numbers that a person reads."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Collection, Sequence

from sffx.blocks import MIB, Block, BlockPlan, Input, Leaf, Options, option_name
from sffx.draw.fold import JOINT, Run, relative
from sffx.draw.inner import joins_in_words
from sffx.draw.progress import ACCURACY_COLOURS, RATE_COLOURS, Progress, percent
from sffx.learning.heads import REGIONS, parse_goodness

INK = "#1f2933"
FAINT = "#66727f"
RED = "#c0392b"
BLUE = "#2b6cb0"
GREY = "#5f6b7a"
AMBER = "#9a5b00"
GREEN = "#4a6b4f"
TEAL = "#0f6674"

# Widths in characters, then in points; they fit each other at the sizes of the letters below.
NAME_WIDTH = 37
MODULE_WIDTH = 30
VALUE_WIDTH = 24
LINE_WIDTH = 66
NOTE_WIDTH = 90
NAME_POINTS = 268
TARGET_POINTS = 70
MARK_POINTS = 60

GAP = '<TR><TD HEIGHT="8"></TD></TR>'

_ALIKE = "blocks in a row that have the same modules, shape and cost"

# What a legend tells: what must be drawn for it to be told, "" where it always is; a sample; its colour; its meaning.
LEGEND = (
    ("", "– – →", RED, "cut: the output is {cut}; no gradient crosses"),
    (
        "",
        "–––→",
        BLUE,
        "goodness{heads}: the block learns by it alone; its mean over the blocks is the prediction",
    ),
    ("run", "double box", INK, _ALIKE),
    ("thick", "thick frame", INK, _ALIKE),
    ("", "last box", GREEN, "classifier: learns by cross-entropy from its own logits"),
    (
        "join",
        "inside",
        TEAL,
        "paths that part and meet inside the block, as a shortcut does; gradient runs through them as ever",
    ),
    (
        "wide",
        "cat of 9",
        TEAL,
        "reads nine values, of which the edge of the last is drawn; an svg names them where the pointer rests",
    ),
    ("side", "–––→", GREY, "side value: a later block reads it as well; it carries no gradient"),
    (
        "detached",
        "· · · →",
        RED,
        "side value, detached: it carries a gradient, which the cut stops",
    ),
    ("rail", "+ a · a", GREY, "+ a: the block computes the side value a; a: the block reads it"),
    (
        "",
        "in a box",
        FAINT,
        "output shape · parameters · multiply-adds (MACs) · activations kept for backward; both of one sample",
    ),
)

# Of norms in words: what is written beside a cut.
DONE = {"layer": "layer-normed", "batch": "batch-normed"}

DETAILS = ("blocks", "modules", "nodes")
MODULES_SHOWN = 8
MODULE_LINES = 2
VALUES_SHOWN = 4


def title_label(plan: BlockPlan, progress: Progress | None = None) -> str:
    """The heading of the drawing: the model, the policy, what the blocks come to together, and how well the net does as a whole."""
    heading = _text(f"{plan.model}: {blocks_in_words(plan)} and the classifier", size=16, bold=True)
    told = [" · ".join(facts(plan)), *([progress.summary()] if progress else [])]
    return _table([_row(heading), *(_row(_text(line, FAINT)) for line in told), GAP])


def cut_in_words(options: Options) -> str:
    """What is done at a cut: "detach · layer norm"."""
    norm = option_name(options.norm)
    return "detach" if norm == "none" else f"detach · {norm} norm"


def meaning(text: str, plan: BlockPlan) -> str:
    """What a line of the legend says of a plan: which norm and which heads it has."""
    norm = option_name(plan.options.norm)
    done = "detached" if norm == "none" else f"detached and {DONE.get(norm, f'normed ({norm})')}"
    return text.format(cut=done, heads=f" ({heads_in_words(plan.options)})")


def heads_in_words(options: Options) -> str:
    """What the heads are: "SFF", "SFF, kernels of 3", "CwC: groups of channels, no parameters"."""
    if callable(options.goodness):
        return option_name(options.goodness)
    name, numbers = parse_goodness(options.goodness)
    if name == "cwc":
        return "CwC: groups of channels, no parameters"
    if name in ("cosine", "mlp"):
        regions = numbers[-1]
        kind = (
            "cosine: a direction for each class"
            if name == "cosine"
            else f"cosine after a hidden layer of {numbers[0]} units"
        )
        return kind if regions == REGIONS else f"{kind}, {regions} x {regions} regions"
    kernel = f", kernels of {options.kernel_size}" if options.kernel_size > 1 else ""
    return f"SFF{kernel}"


def blocks_in_words(plan: BlockPlan) -> str:
    """How many blocks there are: "9 feature blocks"."""
    return "1 feature block" if len(plan) == 1 else f"{len(plan)} feature blocks"


def facts(plan: BlockPlan) -> tuple[str, ...]:
    """What the blocks come to together, one short phrase each."""
    stages = plan.all_blocks
    kept = [stage.activation_bytes for stage in stages]
    return (
        f"policy {plan.policy}",
        f"{plan.num_classes} classes",
        f"{count(sum(stage.macs for stage in stages))} MACs",
        f"activations kept for one sample: {memory(sum(kept))} in all, {memory(max(kept))} in the largest block",
    )


def figures(block: Block) -> str:
    """The shape and the cost of a block in one line."""
    costs = (
        f"{count(block.num_parameters)} parameters",
        f"{count(block.macs)} MACs",
        memory(block.activation_bytes),
    )
    return " · ".join((shape_text(block.shape), *costs))


def input_label(value: Input) -> str:
    """One of the model's inputs: its name, the shape of one sample, its dtype."""
    return _table(
        [
            _row(_text(value.name, size=11, bold=True)),
            _row(_text(f"{shape_text(value.shape)} {value.dtype}", FAINT, 9)),
        ]
    )


def block_label(
    block: Block, leaves: Sequence[Leaf], progress: Progress | None = None, *, contents: bool = True
) -> str:
    """A block: its name and target, the modules inside and the paths that meet there, what was not traced, its shape and its cost.

    Args:
        block: of the plan.
        leaves: those of its modules that were not traced.
        progress: of its training, where it is told.
        contents: whether what is inside is told in words; not where it is drawn.
    """
    run = block if isinstance(block, Run) else None
    times = f"{len(run.blocks)} × " if run else ""
    called = (
        f"{block.target} … {run.blocks[-1].target.removeprefix('block_')}" if run else block.target
    )
    name = f'<TD ALIGN="LEFT" WIDTH="{NAME_POINTS}">{_text(times + _block_name(block.name), size=12, bold=True)}</TD>'
    target = f'<TD ALIGN="RIGHT" WIDTH="{TARGET_POINTS}">{_text(called, FAINT, 9)}</TD>'
    rows = [f"<TR>{name}{target}</TR>"]
    rows += [_row(_text(line, FAINT, 9), span=2) for line in (_modules(block) if contents else ())]
    rows += (
        [_row(_text(f"inside: {joins_in_words(block)}", TEAL, 9), span=2)]
        if contents and joins_in_words(block)
        else []
    )
    rows += [
        _row(
            _text(
                f"not traced: {shorten(relative(leaf.qualname, block), MODULE_WIDTH)} ({leaf.kind})",
                AMBER,
                9,
            ),
            span=2,
        )
        for leaf in leaves
    ]
    rows.append(_row(_text(("each " if run else "") + figures(block)), span=2))
    return _table([*rows, *(_progress_row(block.target, progress) if progress else [])])


def _progress_row(target: str, progress: Progress) -> list[str]:
    told = _text(f"accuracy {percent(progress.accuracy[target])}", bold=True)
    rate = (
        _text(f"learning rate {progress.rates[target]:.1e}")
        if target in progress.rates
        else _text("no learning rate", FAINT)
    )
    colour = f' BGCOLOR="{progress.rate_colour(target)}"' if target in progress.rates else ""
    cells = f'<TD ALIGN="LEFT" WIDTH="150">{told}</TD><TD ALIGN="LEFT" CELLPADDING="3"{colour}>{rate}</TD>'
    table = (
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR>{cells}</TR></TABLE>'
    )
    return [_row(table, span=2)]


def head_label(block: Block, plan: BlockPlan) -> str:
    """The head beside a block: what it takes its goodness by."""
    options, axes = plan.options, len(block.shape) - 1
    goodness = option_name(options.goodness)
    rows = [f"{plan.num_classes} classes"]
    kinds = {"cwc": ["CwC, no parameters"], "cosine": ["cosine"], "mlp": ["hidden layer", "cosine"]}
    rows += [goodness] if callable(options.goodness) else kinds.get(goodness.partition("(")[0], [])
    rows += (
        [f"{'×'.join([str(options.kernel_size)] * axes)} kernels"]
        if goodness == "sff" and options.kernel_size > 1 and axes
        else []
    )
    return _table(
        [_row(_text("goodness", BLUE, bold=True)), *(_row(_text(row, BLUE, 9)) for row in rows)]
    )


def edge_label(names: Sequence[str], colour: str) -> str:
    """What an edge carries, one name a line; a small gap keeps the text off the line of the edge."""
    return _table(
        [
            f'<TR><TD WIDTH="5"></TD><TD ALIGN="LEFT">{_text(name, colour, 9)}</TD></TR>'
            for name in _fold(names)
        ]
    )


def stop_label(names: Sequence[tuple[str, str]]) -> str:
    """What a block takes from the rail beside it, or gives to it: names with their colours, one a line."""
    colours = dict(names)
    return _table(
        [
            _row(_text(name, colours.get(name, FAINT), 9))
            for name in _fold([name for name, _ in names])
        ]
    )


def footer_label(plan: BlockPlan, shown: Collection[str], progress: Progress | None = None) -> str:
    """The legend, and under it what the reader of the plan must know.

    Args:
        plan: its leaves and notes are told.
        shown: what the drawing holds besides blocks and cuts and is to be explained, as `LEGEND` names it.
        progress: whose colours are explained.

    Returns:
        an HTML-like label.
    """
    rows = [GAP]
    for kind, mark, colour, text in LEGEND:
        rows += [_sample(mark, colour, meaning(text, plan))] if not kind or kind in shown else []
    rows += _scales(progress) if progress else []
    for leaf in plan.leaves:
        rows += _paragraph(
            "not traced",
            AMBER,
            f"{leaf.qualname} ({leaf.kind}, {leaf.share:.0%} of the parameters): {leaf.reason}",
        )
    for note in plan.notes:
        rows += _paragraph("note", FAINT, note)
    return _table(rows)


def _scales(progress: Progress) -> list[str]:
    """The colours of accuracies and of learning rates, with the lowest and the highest value of each."""
    accuracies, rates = progress.of_blocks.values(), progress.rates.values()
    rows = [
        _scale(
            "box", ACCURACY_COLOURS, "accuracy", percent(min(accuracies)), percent(max(accuracies))
        )
    ]
    return rows + (
        [_scale("inset", RATE_COLOURS, "learning rate", f"{min(rates):.1e}", f"{max(rates):.1e}")]
        if rates
        else []
    )


def _scale(mark: str, colours: tuple[str, str], name: str, low: str, high: str) -> str:
    ends = "".join(
        f'<TD BGCOLOR="{colour}">{_text(text, size=9)}</TD>'
        for colour, text in zip(colours, (low, high), strict=True)
    )
    cells = f"<TD>{_text(f'{name}, lowest and highest  ', FAINT, 9)}</TD>{ends}"
    table = (
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="3"><TR>{cells}</TR></TABLE>'
    )
    return f'<TR><TD ALIGN="LEFT" WIDTH="{MARK_POINTS}">{_text(mark, FAINT, 9)}</TD><TD ALIGN="LEFT">{table}</TD></TR>'


def escape(text: str) -> str:
    """Text as it may stand in an HTML-like label.

    Args:
        text: anything; white space and characters that do not print become single spaces.

    Returns:
        the text with `&`, `<`, `>`, quotes and backslashes escaped; never empty, because Graphviz refuses an empty font element.
    """
    # Graphviz replaces \N, \G and others inside HTML-like labels as well, so a backslash is doubled.
    return html.escape(" ".join(printable(text).split())).replace("\\", "\\\\") or " "


def printable(text: str) -> str:
    """The text with a space in the place of every character that does not print."""
    return "".join(character if character.isprintable() else " " for character in text)


def shorten(name: str, width: int) -> str:
    """A name that fits, shortened from the left, because the end of a qualname is what tells it from its neighbours.

    Args:
        name: of a block, a module or a value.
        width: the largest number of characters.

    Returns:
        the name, or an ellipsis and its end; the end begins after a dot if that loses less than half of it.
    """
    if len(name) <= width:
        return name
    first = len(name) - width + 1
    start = name.find(".", first - 1) + 1
    return "…" + name[start if first <= start <= first + width // 2 else first :]


def count(number: int) -> str:
    """A number with three significant digits and its unit prefix: `11.7 M`, `230 k`, `64`."""
    size = float(number)
    for prefix in ("", " k", " M", " G"):
        if size < 999.5:
            return _digits(size) + prefix if prefix else str(number)
        size /= 1000
    return f"{_digits(size)} T"


def memory(size: int) -> str:
    """Bytes in the largest binary unit that leaves a digit before the point: `4.59 MiB`."""
    for unit, factor in (("GiB", MIB * 1024), ("MiB", MIB), ("KiB", 1024)):
        if size >= factor:
            return f"{_digits(size / factor)} {unit}"
    return f"{size} B"


def _digits(size: float) -> str:
    if size < 9.995:
        return f"{size:.2f}"
    return f"{size:.1f}" if size < 99.95 else f"{size:.0f}"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as it is written in drawings: `64×56×56`."""
    return "×".join(map(str, shape)) or "scalar"


def _block_name(name: str) -> str:
    """A block's name that fits its box; of "first … last" both keep their ends."""
    first, joint, last = name.partition(JOINT)
    if len(name) <= NAME_WIDTH or not joint:
        return shorten(name, NAME_WIDTH)
    room = NAME_WIDTH - len(joint)
    last = shorten(last, room - min(len(first), room // 2))
    return shorten(first, room - len(last)) + joint + last


def _modules(block: Block) -> list[str]:
    """The modules inside, as deep as there is room for: `conv1 · relu ×2`, or `mlp (5)` for a module with five leaves."""
    paths = [
        relative(qualname, block).split(".") for qualname in block.modules if qualname != block.name
    ]
    items: list[str] = []
    for depth in range(max(map(len, paths), default=0), 0, -1):
        groups: dict[str, list[str]] = {}
        for path in paths:
            groups.setdefault(".".join(path[:depth]), []).append(".".join(path))
        items = [_counted(name, leaves) for name, leaves in groups.items()]
        if len(items) <= MODULES_SHOWN and len(_lines(items)) <= MODULE_LINES:
            return _lines(items)
    if len(items) <= MODULES_SHOWN:
        return _lines(items)
    return _lines([*items[:4], f"… {len(items) - 7} more …", *items[-3:]])


def _counted(name: str, leaves: Sequence[str]) -> str:
    if len(set(leaves)) > 1:
        return f"{shorten(name, MODULE_WIDTH)} ({len(set(leaves))})"
    return shorten(leaves[0], MODULE_WIDTH) + (f" ×{len(leaves)}" if len(leaves) > 1 else "")


def _fold(names: Sequence[str]) -> list[str]:
    if len(names) <= VALUES_SHOWN:
        return list(names)
    return [*names[: VALUES_SHOWN - 1], f"… {len(names) - VALUES_SHOWN + 1} more"]


def _lines(items: Sequence[str]) -> list[str]:
    # Not textwrap: it would break inside "relu ×2".
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 3 <= LINE_WIDTH:
            lines[-1] += f" · {item}"
        else:
            lines.append(item)
    return lines


def _text(text: str, colour: str = INK, size: int = 10, bold: bool = False) -> str:
    font = f'<FONT COLOR="{colour}" POINT-SIZE="{size}">{escape(text)}</FONT>'
    return f"<B>{font}</B>" if bold else font


def _row(text: str, span: int = 1) -> str:
    return f'<TR><TD ALIGN="LEFT" COLSPAN="{span}">{text}</TD></TR>'


def _sample(mark: str, colour: str, meaning: str) -> str:
    return f'<TR><TD ALIGN="LEFT" WIDTH="{MARK_POINTS}">{_text(mark, colour, 9)}</TD><TD ALIGN="LEFT">{_text(meaning, FAINT, 9)}</TD></TR>'


def _paragraph(mark: str, colour: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, NOTE_WIDTH) or [" "]
    return [_sample(mark, colour, first), *(_sample(" ", colour, line) for line in rest)]


def _table(rows: Sequence[str]) -> str:
    # No borders: the shape of the node draws the box.
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1">{"".join(rows)}</TABLE>>'
