"""Pictures of accuracies, for several methods or epoch by epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.draw.render import PICTURES, check_path
from sffx.errors import InputError, shown
from sffx.parts import index_of, is_block
from sffx.plots.figure import blank, in_percent, open_frame, plain, point_style, save
from sffx.plots.history import Epoch, epochs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Readouts with their accuracies, in order.
Pairs = Sequence[tuple[str, float]]

PANELS = {"accuracy": "accuracy", "loss": "loss, nats", "lr": "learning rate"}
# This readout is the last block itself, which has a line already.
NOT_DRAWN = "last"
# The colours of readouts of the whole net. Their lines are dashed. Blocks have colours by depth.
WHOLE = {"ensemble": "#000000", "weighted": "#0072b2", "classifier": "#d55e00", "model": "#000000"}
# Other names have these colours in turn, which no line above has.
OTHERS = ("#cc79a7", "#5f6b7a", "#e69f00", "#56b4e9")
DASHES = ("--", "-.", ":")
# With more blocks than this, the legend names only the first, the middle and the last one.
BLOCKS_NAMED = 16
# Fewer epochs than this are points as well as a line.
POINTS = 30
# An axis has at most so many ticks.
TICKS = 20

HINT = "Hint: pass {'SFF': sffx.evaluate(net, loader)}"


def plot_accuracy(evaluations: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the accuracy of each readout for several methods.

    The blocks of a method are a line; the readouts of the whole net stand beside it.

    Args:
        evaluations: an evaluation for each method's name. It is the result of `sffx.evaluate`, or
            accuracies between 0 and 1 by readout, as a mapping or as pairs. Names such as "block_3"
            are blocks; all others ("ensemble", "classifier") stand apart. Methods need not have the
            same readouts.
        path: of the file, .svg, .png or .pdf.

    Returns:
        The path of the file, which is replaced as a whole.

    Raises:
        InputError: there is nothing to plot, an accuracy is not between 0 and 1, the suffix is
            unknown, or the folder does not exist.
        MissingExtra: matplotlib is not installed.
    """
    path = check_path(path, PICTURES)
    if not isinstance(evaluations, Mapping):
        kind = type(evaluations).__name__
        raise InputError(f"evaluations is of type {kind}, not a mapping by methods. {HINT}")
    methods = {method: _pairs(evaluation) for method, evaluation in evaluations.items()}
    _check(methods)

    readouts: list[str] = []
    for pairs in methods.values():
        readouts += [readout for readout, _ in pairs]
    blocks, others = _parted(readouts)
    panels = []
    widths = []
    if blocks:
        panels.append(blocks)
        widths.append(min(8.0, 1.6 + 0.35 * len(blocks)))
    if others:
        # Room to write out each value.
        panels.append(others)
        widths.append(len(others) * (0.6 + 0.4 * len(methods)))

    figure = blank(sum(widths) + 0.9, 4.2, "plotting accuracies")
    rows = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)
    for axes, names in zip(rows[0], panels, strict=True):
        _draw_panel(axes, names, methods)
    rows[0][0].set_ylabel("accuracy")
    in_percent(rows[0][0])
    _add_legend(figure, methods)
    return save(figure, path)


def plot_training(
    history: Any,
    path: str | os.PathLike[str],
    *,
    rates: Sequence[Mapping[str, float]] | None = None,
) -> Path:
    """Draw accuracy, loss and learning rate of each block over the epochs of a training.

    What the history does not hold is left out, as the accuracy of numbers. Blocks are coloured by
    depth, from dark to light.

    Args:
        history: for each epoch what `sffx.evaluate` returned, or a mapping with "accuracy", between
            0 and 1, "loss" and "lr", or some of them, each by name. A value that is nan leaves a
            gap. Or the path of the metrics.csv that
            Lightning's CSVLogger wrote for an `sffx.lightning` module, or several such paths.
        path: of the file, .svg, .png or .pdf.
        rates: the learning rates of each epoch by the block's name, for a history without them:
            `{group["name"]: group["lr"] for group in optimizer.param_groups}`.

    Returns:
        The path of the file, which is replaced as a whole.

    Raises:
        InputError: there is no epoch with an accuracy or a loss, the rates do not fit, a value is
            no number or an accuracy not between 0 and 1, the suffix is unknown, or the folder does
            not exist.
        MissingExtra: matplotlib is not installed.
    """
    path = check_path(path, PICTURES)
    trained = epochs(history, rates)
    kinds = [kind for kind in PANELS if any(getattr(epoch, kind) for epoch in trained)]
    names = _line_names(trained)
    figure = blank(4.4 * len(kinds), 4.0, "plotting a training")
    row = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(row, kinds, strict=True):
        _draw_curves(axes, kind, names, trained)
    handles = _curve_handles(names)
    # One for all panels, since a block has the same colour in each.
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    return save(figure, path)


def _pairs(evaluation: Any) -> Pairs:
    """Return the readouts and accuracies of an evaluation, of a mapping, or of such pairs."""
    accuracy = getattr(evaluation, "accuracy", evaluation)
    pairs = accuracy.items() if isinstance(accuracy, Mapping) else accuracy
    try:
        return [(str(name), float(value)) for name, value in pairs]
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"a method's evaluation is {shown(evaluation)}, not accuracies by readout. {HINT}"
        ) from cause


def _check(methods: Mapping[str, Pairs]) -> None:
    if not any(methods.values()):
        raise InputError(
            "there is no accuracy to plot. Hint: pass {method: [(readout, accuracy), ...]}"
        )
    for method, pairs in methods.items():
        for readout, accuracy in pairs:
            if not 0 <= accuracy <= 1:
                raise InputError(
                    f"the accuracy of {readout!r} by {method!r} is {accuracy}, "
                    "not between 0 and 1. Hint: percent / 100"
                )


def _parted(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of blocks by depth, and the others in their order, each once."""
    blocks = []
    others = []
    for name in dict.fromkeys(names):
        if is_block(name):
            blocks.append(name)
        else:
            others.append(name)
    return sorted(blocks, key=index_of), others


def _draw_panel(axes: Axes, names: Sequence[str], methods: Mapping[str, Pairs]) -> None:
    """Draw the accuracies of some readouts: a line for blocks, points with figures for others."""
    has_blocks = is_block(names[0])
    for index, pairs in enumerate(methods.values()):
        shift = 0.0
        if not has_blocks:
            # Methods stand side by side, so that equal accuracies do not hide each other. They
            # share 0.7 of the width of a readout, with its centre in the middle.
            place = (index + 0.5) / len(methods)
            shift = 0.7 * (place - 0.5)
        accuracies = dict(pairs)
        xs = []
        ys = []
        for position, name in enumerate(names):
            if name in accuracies:
                xs.append(position + shift)
                ys.append(accuracies[name])
        axes.plot(xs, ys, linestyle="-" if has_blocks else "", **point_style(index))
        if not has_blocks:
            _write_figures(axes, xs, ys)
    _set_ticks(axes, names)
    if has_blocks:
        axes.set_xlabel("block")


def _write_figures(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    for x, y in zip(xs, ys, strict=True):
        axes.annotate(
            f"{100 * y:.1f}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7
        )


def _add_legend(figure: Figure, methods: Mapping[str, Pairs]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for index, method in enumerate(methods):
        handles.append(Line2D([], [], label=plain(method), **point_style(index)))
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _set_ticks(axes: Axes, names: Sequence[str]) -> None:
    # With many blocks, every second or third one has a tick.
    step = math.ceil(len(names) / TICKS)
    labels = []
    for name in names[::step]:
        labels.append(str(index_of(name)) if is_block(name) else plain(name))
    axes.set_xticks(range(0, len(names), step), labels)
    # Half a step at both ends, so that the outermost points are not cut off.
    axes.set_xlim(-0.5, len(names) - 0.5)
    open_frame(axes)


def _line_names(trained: Sequence[Epoch]) -> list[str]:
    """Return the names of the lines: the blocks by depth, then the readouts of the whole net."""
    names: dict[str, None] = {}
    for epoch in trained:
        for kind in PANELS:
            names.update(dict.fromkeys(getattr(epoch, kind)))
    blocks, others = _parted(names)
    if blocks and NOT_DRAWN in others:
        others.remove(NOT_DRAWN)
    return [*blocks, *others]


def _draw_curves(axes: Axes, kind: str, names: Sequence[str], trained: Sequence[Epoch]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in names:
        xs = []
        ys = []
        for epoch in trained:
            values = getattr(epoch, kind)
            if name in values:
                xs.append(epoch.number + 1)
                ys.append(values[name])
        # A line between two gaps would have no length, so such points are drawn.
        has_gaps = not all(map(math.isfinite, ys))
        marker = "." if has_gaps or len(trained) < POINTS else ""
        axes.plot(xs, ys, marker=marker, **_curve_style(name, names))
    axes.set_xlabel("epoch")
    label = PANELS[kind]
    if kind == "loss" and not any(epoch.accuracy for epoch in trained):
        # What has no accuracy are numbers, whose loss is no entropy.
        label = "loss"
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kind == "accuracy":
        in_percent(axes)
    elif _spans_a_decade(kind, trained):
        axes.set_yscale("log")
    open_frame(axes)


def _spans_a_decade(kind: str, trained: Sequence[Epoch]) -> bool:
    """Return whether the smallest values would look alike on a linear axis."""
    values: list[float] = []
    for epoch in trained:
        values += filter(math.isfinite, getattr(epoch, kind).values())
    lowest = min(values, default=0)
    # A logarithmic axis has no place for 0.
    if lowest <= 0:
        return False
    return max(values) >= 10 * lowest


def _curve_style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Return how the line of a block or a readout looks, among all names that are drawn."""
    from matplotlib import colormaps

    blocks, whole = _parted(names)
    if name in WHOLE:
        return {"color": WHOLE[name], "linestyle": "--", "linewidth": 1.6}
    if not is_block(name):
        unknown = [other for other in whole if other not in WHOLE]
        index = unknown.index(name)
        # When all colours are used, they come again with other dashes.
        turns = index // len(OTHERS)
        colour = OTHERS[index % len(OTHERS)]
        dashes = DASHES[turns % len(DASHES)]
        return {"color": colour, "linestyle": dashes, "linewidth": 1.6}
    # From 0 for the first block to 1 for the last.
    depth = blocks.index(name) / max(1, len(blocks) - 1)
    # The lightest colours of the scale would not be seen on white.
    return {"color": colormaps["viridis"](0.88 * depth), "linewidth": 1.2}


def _curve_handles(names: Sequence[str]) -> list[Any]:
    """Return the lines of the legend."""
    from matplotlib.lines import Line2D

    blocks, others = _parted(names)
    if len(blocks) > BLOCKS_NAMED:
        blocks = [blocks[0], blocks[len(blocks) // 2], blocks[-1]]
    handles = []
    for name in (*blocks, *others):
        label = plain(name.replace("_", " "))
        handles.append(Line2D([], [], label=label, **_curve_style(name, names)))
    return handles
