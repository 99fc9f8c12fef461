"""A block plan as one HTML page that needs nothing else: no network, no Graphviz."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files

from sffx.blocks import Block, BlockPlan, Input
from sffx.draw.fold import Run, fold, leaves_in, relative
from sffx.draw.graph import Crossing, crossings
from sffx.draw.inner import JOIN_SIGNS, Part, joins_in_words, parts
from sffx.draw.label import (
    LEGEND,
    blocks_in_words,
    count,
    cut_in_words,
    facts,
    figures,
    meaning,
    memory,
    printable,
    shape_text,
    shorten,
)
from sffx.draw.progress import Progress, percent

# The page can reach nothing but itself, whatever a model's names hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
BUTTONS = (
    ("in", "zoom in"),
    ("out", "zoom out"),
    ("actual", "actual size"),
    ("fit", "fit"),
    ("unfold", "unfold all"),
    ("fold", "fold all"),
)
KEYS = "Tab: next block · Enter: unfold · arrows: pan · + and −: zoom · 0: actual size · f: fit · Ctrl and wheel: zoom · drag: pan"
COLOURS = {
    "#c0392b": "red",
    "#2b6cb0": "blue",
    "#4a6b4f": "green",
    "#66727f": "",
    "#0f6674": "teal",
}
# What the page always explains of the legend; it has no rail, and names side values beside their lines.
TOLD = ("", "join")

# Of a list of parts: the height of a line, the room at its left for the edges, and the width of a name in characters.
PART_HEIGHT, EDGE_ROOM, PART_WIDTH = 20, 72, 52


@dataclass(frozen=True)
class Sheet:
    """What every part of the page is drawn from.

    Attributes:
        plan: the whole plan.
        crossings: values that cross a cut besides the normalised output.
        unfold: whether runs of blocks that look alike are open from the start.
        detail: "blocks", or "modules" or "nodes", which are open from the start.
        progress: of the training, if it is told.
    """

    plan: BlockPlan
    crossings: list[Crossing]
    unfold: bool
    detail: str
    progress: Progress | None


def page(
    plan: BlockPlan,
    *,
    unfold: bool = False,
    detail: str = "blocks",
    progress: Progress | None = None,
) -> str:
    """The text of an HTML page with the block graph: blocks unfold into their modules, runs of alike blocks into their blocks.

    Args:
        plan: of the model, as `sffx.plan` returns it.
        unfold: whether runs of blocks that look alike are open from the start.
        detail: what is open from the start: "blocks" nothing, "modules" the modules of every block, "nodes" its nodes as well.
        progress: of a training, by which the blocks are coloured; then runs are open from the start.

    Returns:
        the page. A block's element bears its target as its id ("block_3", "classifier"), a model input "input_x".
        The same plan always gives the same text.
    """
    sheet = Sheet(plan, crossings(plan), unfold or progress is not None, detail, progress)
    title = f"{plan.model}: {blocks_in_words(plan)} and the classifier"
    graph = "\n".join([_values(sheet), *_inputs(sheet), *_stages(sheet)])
    buttons = " ".join(
        f'<button type="button" id="{name}">{text}</button>' for name, text in BUTTONS
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width">
<title>{_text(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header><h1>{_text(title)}</h1>
<p>{_text(" · ".join(facts(plan)))}</p>{f"<p>{_text(progress.summary())}</p>" if progress else ""}
<div role="toolbar" aria-label="view">{buttons}</div></header>
<main id="view" tabindex="0" aria-label="block graph"><div id="sheet"><div id="graph">
{graph}
</div></div></main>
<aside id="figures" aria-live="polite"></aside>
<footer>{"".join(f"<div>{line}</div>" for line in _footer(sheet))}</footer>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("sffx.draw").joinpath(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return html.escape(printable(text))


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(map(_text, lines))


def _values(sheet: Sheet) -> str:
    """The lines of the values that cross a cut; the script sets their course, because it depends on what is unfolded."""
    stages = sheet.plan.all_blocks
    lines = []
    for lane, crossing in enumerate(sheet.crossings):
        kind = "input" if crossing.stage < 0 else "side detached" if crossing.detached else "side"
        for reader in crossing.readers:
            ends = f'data-from="{_text(crossing.source)}" data-to="{stages[reader].target}" data-lane="{lane}"'
            # The arrow from the inputs to the first block is drawn already.
            if crossing.stage >= 0 or reader:
                lines.append(
                    f'<path class="{kind}" {ends}><title>{_text(", ".join(crossing.names))}</title></path>'
                )
    return f'<svg id="values" aria-hidden="true">{"".join(lines)}</svg>'


def _inputs(sheet: Sheet) -> Iterator[str]:
    for value in sheet.plan.inputs:
        yield _input(value)
    for crossing in sheet.crossings:
        if crossing.source.startswith("value_"):
            yield f'<div class="input" id="{_text(crossing.source)}"><b>{_text(", ".join(crossing.names))}</b></div>'
    yield '<div class="arrow"></div>'


def _input(value: Input) -> str:
    told = f"{shape_text(value.shape)} {value.dtype}"
    return f'<div class="input" id="input_{_text(value.name)}"><b>{_text(value.name)}</b> <span class="says">{_text(told)}</span></div>'


def _stages(sheet: Sheet) -> Iterator[str]:
    index = 0
    for block in fold(sheet.plan).blocks:
        members = block.blocks if isinstance(block, Run) else (block,)
        inside = "\n".join(_with_cuts(sheet, members, index))
        yield _run(block, inside, sheet) if isinstance(block, Run) else inside
        yield _cut(sheet)
        index += len(members)
    yield _stage(sheet.plan.classifier, index, sheet)


def _with_cuts(sheet: Sheet, blocks: Iterable[Block], start: int) -> Iterator[str]:
    for index, block in enumerate(blocks, start):
        if index > start:
            yield _cut(sheet)
        yield _stage(block, index, sheet)


def _cut(sheet: Sheet) -> str:
    return f'<div class="cut">{_text(cut_in_words(sheet.plan.options))}</div>'


def _run(run: Run, inside: str, sheet: Sheet) -> str:
    count_ = len(run.blocks)
    targets = f"{run.blocks[0].target} … {run.blocks[-1].target}"
    told = _lines([f"{count_} blocks alike: {run.name}", *_all_figures(run, sheet.plan)])
    summary = (
        f'<summary data-figures="{told}"><span class="target">{_text(targets)}</span><b>{count_} × {_text(run.name)}</b>'
        f'<span class="facts">each: {_text(figures(run))}</span></summary>'
    )
    opened = " open" if sheet.unfold else ""
    return f'<details class="box run" id="run_{run.target}"{opened}>{summary}<div class="inside">{inside}</div></details>'


def _stage(block: Block, index: int, sheet: Sheet) -> str:
    last = block is sheet.plan.classifier
    kind = "classifier" if last else "untraced" if leaves_in(block, sheet.plan) else "block"
    told = _lines([f"{block.name} ({block.target})", *_all_figures(block, sheet.plan)])
    share = block.activation_bytes / max(
        1, *(stage.activation_bytes for stage in sheet.plan.all_blocks)
    )
    summary = (
        f'<summary data-figures="{told}"><span class="target">{block.target}</span><b>{_text(block.name)}</b>'
        f'<span class="facts">{_text(figures(block))}</span>{"".join(_says(block, index, sheet))}{_badges(block, sheet)}'
        f'<span class="bar" style="width:{100 * share:.1f}%"></span></summary>'
    )
    opened = " open" if sheet.detail != "blocks" else ""
    head = (
        ""
        if last
        else f'<div class="head"><span>goodness, {sheet.plan.num_classes} classes</span></div>'
    )
    edge = (
        f' style="border-left: 12px solid {sheet.progress.accuracy_colour(block.target)}"'
        if sheet.progress
        else ""
    )
    inside = f'<div class="inside">{_inside(block, sheet)}</div>'
    box = (
        f'<details class="box {kind}" id="{block.target}"{edge}{opened}>{summary}{inside}</details>'
    )
    return f'<div class="stage">{box}{head}</div>'


def _badges(block: Block, sheet: Sheet) -> str:
    """The accuracy and the learning rate of a block, each on its colour."""
    progress = sheet.progress
    if progress is None:
        return ""
    told = [
        (
            progress.accuracy_colour(block.target),
            f"accuracy {percent(progress.accuracy[block.target])}",
        )
    ]
    if block.target in progress.rates:
        told.append(
            (
                progress.rate_colour(block.target),
                f"learning rate {progress.rates[block.target]:.1e}",
            )
        )
    return "".join(
        f'<span class="badge" style="background: {colour}">{text}</span>' for colour, text in told
    )


def _all_figures(block: Block, plan: BlockPlan) -> Iterator[str]:
    each = " of each" if isinstance(block, Run) else ""
    stages = plan.all_blocks
    yield f"output{each}: {shape_text(block.shape)}, after node {block.output}"
    for name, unit, field in (
        ("parameters", count, "num_parameters"),
        ("multiply-adds", count, "macs"),
        ("kept", memory, "activation_bytes"),
    ):
        own, whole = getattr(block, field), sum(getattr(stage, field) for stage in stages)
        yield f"{name}{each}: {unit(own)}, {own / max(1, whole):.1%} of the model"


def _says(block: Block, index: int, sheet: Sheet) -> Iterator[str]:
    """What a block gives to later blocks and reads from elsewhere, and what in it could not be traced."""
    for crossing in sheet.crossings:
        names = ", ".join(crossing.names)
        kind = "says detached" if crossing.detached else "says"
        if crossing.stage == index:
            yield f'<span class="{kind}">gives {_text(names)}{" (detached)" if crossing.detached else ""}</span>'
        if index in crossing.readers and (crossing.stage >= 0 or index):
            yield f'<span class="{kind}">reads {_text(names)}</span>'
    if joins_in_words(block):
        yield f'<span class="says join">inside: {_text(joins_in_words(block))}</span>'
    for leaf in leaves_in(block, sheet.plan):
        told = f"not traced: {relative(leaf.qualname, block)} ({leaf.kind}): {leaf.reason}"
        yield f'<span class="says untraced">{_text(told)}</span>'


def _inside(block: Block, sheet: Sheet) -> str:
    opened = " open" if sheet.detail == "nodes" else ""
    return (
        f"{len(block.modules)} calls of modules{_flow(parts(block, 'modules'))}"
        f"<details{opened}><summary>{len(block.nodes)} nodes of the graph</summary>{_flow(parts(block, 'nodes'))}</details>"
    )


def _flow(inside: list[Part]) -> str:
    """What the parts read from outside, and the parts below it in the order they run, with an arc at the left from each to its readers."""
    own = {part.node.name for part in inside}
    outer = list(
        dict.fromkeys(read for part in inside for read in part.node.reads if read not in own)
    )
    row = {name: index for index, name in enumerate([*outer, *(part.node.name for part in inside)])}
    arcs = [_arc(row[read], row[part.node.name]) for part in inside for read in part.node.reads]
    lines = [
        f'<li class="outer" title="{_text(name)}, from outside">{_text(shorten(name, PART_WIDTH))} →</li>'
        for name in outer
    ]
    lines += [
        f'<li title="{_text(p.node.name)}"{_part_class(p)}>{_text(shorten(p.text, PART_WIDTH))}</li>'
        for p in inside
    ]
    size = f'width="{EDGE_ROOM}" height="{PART_HEIGHT * len(row)}"'
    return f'<div class="flow"><svg {size} aria-hidden="true">{"".join(arcs)}</svg><ol>{"".join(lines)}</ol></div>'


def _part_class(part: Part) -> str:
    kind = "join" if part.node.join in JOIN_SIGNS else "" if part.node.is_path else "aside"
    return f' class="{kind}"' if kind else ""


def _arc(start: int, end: int) -> str:
    top, bottom = (PART_HEIGHT * index + PART_HEIGHT / 2 for index in (start, end))
    reach = EDGE_ROOM - 6 - min(EDGE_ROOM - 12, 8 * (end - start - 1))
    side = EDGE_ROOM - 6
    kind = "next" if end == start + 1 else "skip"
    return f'<path class="{kind}" d="M {side} {top + 3:g} C {reach} {top + 6:g} {reach} {bottom - 6:g} {side} {bottom - 3:g}"/>'


def _footer(sheet: Sheet) -> Iterator[str]:
    yield _text(KEYS)
    for kind, mark, colour, text in LEGEND:
        if kind in TOLD and colour in COLOURS:
            yield f'<span class="{COLOURS[colour]}">{_text(mark)}</span> {_text(meaning(text, sheet.plan))}'
    if sheet.progress:
        yield "colour at the left of a box: accuracy, pale for the lowest; learning rates likewise"
    yield _text(
        "bar in a box: activations kept, against the block that keeps most; lines at the left: values that cross a cut, dotted: detached"
    )
    for leaf in sheet.plan.leaves:
        told = f"{leaf.qualname} ({leaf.kind}, {leaf.share:.0%} of the parameters): {leaf.reason}"
        yield f'<span class="amber">not traced</span> {_text(told)}'
    for note in sheet.plan.notes:
        yield f"note: {_text(note)}"
