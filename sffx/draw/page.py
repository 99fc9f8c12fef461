"""A plan as one HTML page that needs nothing else: no network and no Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from sffx.blocks import Block, BlockPlan
from sffx.draw.crossings import Crossing, crossings, is_read_by_next
from sffx.draw.detail import joins_in_words, parts
from sffx.draw.flow import Flow, Words, flow_of
from sffx.draw.fold import Run, fold, leaves_in, relative
from sffx.draw.legend import entries
from sffx.draw.progress import Progress, percent
from sffx.draw.style import BLUE, FAINT, GREEN, RED, TEAL
from sffx.draw.words import (
    NOT_READ,
    block_facts,
    cut_in_words,
    head_in_words,
    heading,
    plan_facts,
    printable,
    shape_in_words,
)
from sffx.plan_table import leaf_in_words
from sffx.tables import short_byte_size, short_number

# The page can reach nothing but itself, whatever the names of a model hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

BUTTONS = (
    ("in", "zoom in"),
    ("out", "zoom out"),
    ("actual", "actual size"),
    ("fit", "fit"),
    ("unfold", "unfold all"),
    ("fold", "fold all"),
)
KEYS = (
    "Tab: next block · Enter: unfold · arrows: pan · + and −: zoom · 0: actual size · f: fit · "
    "Ctrl and wheel: zoom · drag: pan"
)
BAR_MEANING = (
    "bar in a box: activations kept, against the block that keeps most; "
    "lines at the left: values that cross a cut, dotted: detached"
)
COLOUR_MEANING = (
    "colour at the left of a box: accuracy, pale for the lowest; learning rates likewise"
)

# Of a badge that is neither low nor high: light, because its letters are dark.
NO_COLOUR = "#e3e7eb"

# The classes of colours in the page, which has others for light and for dark.
COLOUR_CLASSES = {RED: "red", BLUE: "blue", GREEN: "green", FAINT: "", TEAL: "teal"}


@dataclass(frozen=True)
class Colour:
    """A text on a colour, "#rrggbb"."""

    text: str
    colour: str


@dataclass(frozen=True)
class Box:
    """A block, as it is shown.

    Attributes:
        target: of the block, which is the id of its element.
        name: of the block.
        kind: "block", "untraced" or "classifier".
        facts: its shape and costs in one line.
        figures: the same in several lines, with shares of the model.
        remarks: what it gives and reads besides its output, its joins, and what was not traced.
        badges: its accuracy and its learning rate, empty without a training.
        colour: of its accuracy, "" without a training.
        bar: its kept activations in percent of those of the block that keeps most.
        head: what its head scores and how, "" for the classifier.
        below: what stands between it and the next block: what the cut does, or that there is none.
        calls: how many modules it calls.
        modules: its modules and joins.
        node_count: how many nodes it has.
        nodes: all its nodes.
    """

    target: str
    name: str
    kind: str
    facts: str
    figures: list[str]
    remarks: list[Words]
    badges: list[Colour]
    colour: str
    bar: str
    head: str
    below: Words
    calls: int
    modules: Flow
    node_count: int
    nodes: Flow


@dataclass(frozen=True)
class RunBox:
    """The frame around blocks that look alike: the target of the first, and texts on all."""

    target: str
    targets: str
    name: str
    facts: str
    figures: list[str]


@dataclass(frozen=True)
class Group:
    """One block, or the blocks of a run with their frame."""

    boxes: list[Box]
    run: RunBox | None = None


@dataclass(frozen=True)
class InputBox:
    """A model input or another value that no block computes; the id of its element and texts."""

    ident: str
    name: str
    facts: str = ""


@dataclass(frozen=True)
class Line:
    """A line from a value to a block that reads it. The script sets its course.

    Attributes:
        kind: the class of its values.
        source: id of the element that gives them.
        reader: id of the block that reads them.
        lane: lines of one lane run beside the blocks at the same distance.
        names: of the values.
    """

    kind: str
    source: str
    reader: str
    lane: int
    names: str


@dataclass(frozen=True)
class LegendLine:
    """A line of the footer: a mark with the class of its colour, and what it means."""

    mark: str
    kind: str
    text: str


@dataclass(frozen=True)
class Page:
    """All that the template is given; see `page`.

    Attributes:
        title: of the page.
        facts: the lines below the title.
        inputs: the values that no block computes.
        lines: from values to blocks that read them over a cut.
        groups: the blocks in order, the classifier's group last.
        legend: the lines of the footer; each a mark, the class of its colour, and a text.
        runs_open: whether runs are open from the start.
        parts_open: whether the modules of each block are.
        nodes_open: whether the nodes of each block are.
    """

    title: str
    facts: list[str]
    inputs: list[InputBox]
    lines: list[Line]
    groups: list[Group]
    legend: list[LegendLine]
    runs_open: bool
    parts_open: bool
    nodes_open: bool


def page(
    plan: BlockPlan,
    *,
    unfold: bool = False,
    detail: str = "blocks",
    progress: Progress | None = None,
) -> str:
    """Return the text of an HTML page with the graph of a plan.

    Blocks unfold into their modules, and runs of alike blocks into their blocks. The element of a
    block has the block's target as its id ("block_3", "classifier"), a model input "input_x".
    The same plan always gives the same text.

    Args:
        plan: of the model, as `sffx.plan` returns it.
        unfold: whether runs of blocks that look alike are open from the start.
        detail: what is open from the start: "blocks" nothing, "modules" the modules of every block,
            "nodes" its nodes as well.
        progress: of a training. The blocks are coloured by it, and runs are open from the start.
    """
    crossed = crossings(plan)
    facts = [plan_facts(plan)]
    if progress is not None and progress.summary():
        facts.append(progress.summary())
    content = Page(
        title=heading(plan),
        facts=facts,
        inputs=list(_inputs(plan, crossed)),
        lines=list(_lines(plan, crossed)),
        groups=list(_groups(plan, crossed, progress)),
        legend=list(_legend(plan, progress)),
        runs_open=unfold or progress is not None,
        parts_open=detail != "blocks",
        nodes_open=detail == "nodes",
    )
    return _template().render(
        page=content,
        policy=POLICY,
        buttons=BUTTONS,
        keys=KEYS,
        # Files of this package; escaped they would not work.
        css=Markup(_file("page.css")),
        js=Markup(_file("page.js")),
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_file("page.html.jinja"))


def _without_control_characters(value: object) -> object:
    # Markup is what the template or this package wrote; any other text may come from a model.
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _file(name: str) -> str:
    return files("sffx.draw").joinpath(name).read_text(encoding="utf-8")


def _inputs(plan: BlockPlan, crossed: Sequence[Crossing]) -> Iterator[InputBox]:
    for value in plan.inputs:
        kind = f"{shape_in_words(value.shape)} {value.dtype}"
        yield InputBox(f"input_{value.name}", value.name, kind)
    for crossing in crossed:
        if crossing.source.startswith("value_"):
            yield InputBox(crossing.source, ", ".join(crossing.names))


def _lines(plan: BlockPlan, crossed: Sequence[Crossing]) -> Iterator[Line]:
    blocks = plan.all_blocks
    for lane, crossing in enumerate(crossed):
        names = ", ".join(crossing.names)
        for reader in crossing.readers:
            # The arrow from the inputs to the first block is there anyway.
            if not crossing.is_from_outside or reader > 0:
                yield Line(crossing.kind, crossing.source, blocks[reader].target, lane, names)


def _groups(
    plan: BlockPlan, crossed: Sequence[Crossing], progress: Progress | None
) -> Iterator[Group]:
    # A run has several blocks, so the index is not that of the folded plan.
    index = 0
    for block in fold(plan).all_blocks:
        members = block.blocks if isinstance(block, Run) else (block,)
        boxes = []
        for member in members:
            boxes.append(_box(member, index, plan, crossed, progress))
            index += 1
        # A run is a frame around its blocks; any other block stands alone.
        run = _run_box(block, plan) if isinstance(block, Run) else None
        yield Group(boxes, run)


def _run_box(run: Run, plan: BlockPlan) -> RunBox:
    number = len(run.blocks)
    return RunBox(
        target=run.target,
        targets=f"{run.blocks[0].target} … {run.blocks[-1].target}",
        name=f"{number} × {run.name}",
        facts=f"each: {block_facts(run)}",
        figures=[f"{number} blocks alike: {run.name}", *_figures(run, plan)],
    )


def _box(
    block: Block,
    index: int,
    plan: BlockPlan,
    crossed: Sequence[Crossing],
    progress: Progress | None,
) -> Box:
    most = max(1, *(each.activation_bytes for each in plan.all_blocks))
    badges = _badges(block, progress) if progress is not None else []
    return Box(
        target=block.target,
        name=block.name,
        kind=_kind(block, plan),
        facts=block_facts(block),
        figures=[f"{block.name} ({block.target})", *_figures(block, plan)],
        remarks=list(_remarks(block, index, plan, crossed)),
        badges=badges,
        colour=progress.accuracy_colour(block.target) if progress is not None else "",
        bar=f"{100 * block.activation_bytes / most:.1f}",
        head=_head(block, plan),
        below=_below(block, index, plan),
        calls=len(block.modules),
        modules=flow_of(parts(block, "modules")),
        node_count=len(block.nodes),
        nodes=flow_of(parts(block, "nodes")),
    )


def _head(block: Block, plan: BlockPlan) -> str:
    if block is plan.classifier:
        return ""
    return ", ".join(["goodness", *head_in_words(block, plan)])


def _below(block: Block, index: int, plan: BlockPlan) -> Words:
    """Return what stands below a block: what the cut does, or that there is none."""
    if block is plan.classifier:
        return Words("")
    if is_read_by_next(index, plan):
        return Words(cut_in_words(plan.options), "cut")
    return Words(NOT_READ, "cut gap")


def _kind(block: Block, plan: BlockPlan) -> str:
    if block is plan.classifier:
        return "classifier"
    return "untraced" if leaves_in(block, plan) else "block"


def _badges(block: Block, progress: Progress) -> list[Colour]:
    target = block.target
    badges = []
    if target in progress.accuracy:
        accuracy = f"accuracy {percent(progress.accuracy[target])}"
        badges.append(Colour(accuracy, progress.accuracy_colour(target) or NO_COLOUR))
    if target in progress.rates:
        rate = f"learning rate {progress.rates[target]:.1e}"
        badges.append(Colour(rate, progress.rate_colour(target)))
    return badges


def _figures(block: Block, plan: BlockPlan) -> Iterator[str]:
    """Yield the shape of a block, and its costs with their shares of the whole model."""
    each = " of each" if isinstance(block, Run) else ""
    yield f"output{each}: {shape_in_words(block.shape)}, after node {block.output}"
    costs = (
        ("parameters", "num_parameters", short_number),
        ("multiply-adds", "macs", short_number),
        ("kept", "activation_bytes", short_byte_size),
    )
    for name, attribute, in_words in costs:
        own = getattr(block, attribute)
        whole = sum(getattr(other, attribute) for other in plan.all_blocks)
        # A model may have no parameters.
        share = own / max(1, whole)
        yield f"{name}{each}: {in_words(own)}, {share:.1%} of the model"


def _remarks(
    block: Block, index: int, plan: BlockPlan, crossed: Sequence[Crossing]
) -> Iterator[Words]:
    for crossing in crossed:
        names = ", ".join(crossing.names)
        kind = "remark detached" if crossing.detached else "remark"
        if crossing.stage == index:
            yield Words(f"gives {names}{crossing.in_brackets}", kind)
        # That the first block reads the inputs needs no words.
        is_named = not crossing.is_from_outside or index > 0
        if is_named and index in crossing.readers:
            yield Words(f"reads {names}", kind)
    joins = joins_in_words(block)
    if joins:
        yield Words(f"inside: {joins}", "remark join")
    for leaf in leaves_in(block, plan):
        name = relative(leaf.qualname, block)
        yield Words(f"not traced: {name} ({leaf.kind}): {leaf.reason}", "remark untraced")


def _legend(plan: BlockPlan, progress: Progress | None) -> Iterator[LegendLine]:
    # The page has no rail, and names side values beside their lines.
    for entry in entries(("join",), plan):
        yield LegendLine(entry.mark, COLOUR_CLASSES[entry.colour], entry.meaning)
    if progress is not None:
        yield LegendLine("", "", COLOUR_MEANING)
    yield LegendLine("", "", BAR_MEANING)
    for leaf in plan.leaves:
        yield LegendLine("not traced", "amber", leaf_in_words(leaf))
    for note in plan.notes:
        yield LegendLine("note:", "", note)
