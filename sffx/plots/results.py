"""Pictures of results: the accuracy of each block, of the ensemble and of the classifier, for several methods or epoch by epoch."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.draw.progress import BLOCK
from sffx.draw.render import PICTURES, check_path, write
from sffx.errors import InputError, MissingExtra
from sffx.plots.history import Epoch, epochs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Evaluation = Sequence[tuple[str, float]]

# Okabe and Ito's colours, which the colour-blind can tell apart, each with a marker of its own for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

PANELS = {"accuracy": "accuracy", "loss": "loss, nats", "lr": "learning rate"}
# The last block's readout is that block's own line.
NOT_DRAWN = "last"
# Colours of readouts of the whole net, whose lines are dashed; blocks have those of a scale.
WHOLE = {"ensemble": "#000000", "weighted": "#0072b2", "classifier": "#d55e00", "model": "#000000"}
# Of more blocks than this the legend names the first, the middle and the last.
BLOCKS_NAMED = 16


def plot_accuracy(evaluations: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draws the accuracy of each readout for several methods: a line over the blocks, and beside it the readouts of the whole net.

    Args:
        evaluations: for each method's name what `sffx.evaluate` returned, or a mapping or pairs of readouts and their accuracies between
            0 and 1. Names that begin with "block_" are blocks, in order; all others ("ensemble", "classifier") stand apart. Methods need
            not have the same readouts.
        path: of the file, .svg, .png or .pdf.

    Returns:
        the path that was written; the file is replaced as a whole.

    Raises:
        InputError: there is nothing to plot, an accuracy is not between 0 and 1, the suffix is unknown, or the folder does not exist.
        MissingExtra: matplotlib is not installed.
    """
    path = check_path(path, PICTURES)
    if not isinstance(evaluations, Mapping):
        kind = type(evaluations).__name__
        raise InputError(
            f"evaluations is of type {kind}, not a mapping by methods. Hint: pass {{'SFF': sffx.evaluate(net, loader)}}"
        )
    evaluations = {method: _pairs(evaluation) for method, evaluation in evaluations.items()}
    _check(evaluations)
    figure = blank(sum(_widths(evaluations)) + 0.9, 4.2, "plotting accuracies")
    _fill(figure, evaluations)
    return save(figure, path)


def plot_training(
    history: Any,
    path: str | os.PathLike[str],
    *,
    rates: Sequence[Mapping[str, float]] | None = None,
) -> Path:
    """Draws how a training went: accuracy, loss and learning rate of each block over the epochs, where they are known.

    Args:
        history: for each epoch what `sffx.evaluate` returned, or a mapping with "accuracy" and, if known, "loss" and "lr", each by name;
            or the path of the metrics.csv that Lightning's CSVLogger wrote of an `sffx.lightning` module, or several such paths.
        path: of the file, .svg, .png or .pdf.
        rates: the learning rates of each epoch by the block's name, for a history that does not hold them:
            `{group["name"]: group["lr"] for group in optimizer.param_groups}`.

    Returns:
        the path that was written; the file is replaced as a whole. Blocks are coloured by depth, from dark to light.

    Raises:
        InputError: there is no epoch with an accuracy, the rates do not fit, the suffix is unknown, or the folder does not exist.
        MissingExtra: matplotlib is not installed.
    """
    path = check_path(path, PICTURES)
    found = epochs(history, rates)
    kinds = [kind for kind in PANELS if any(getattr(epoch, kind) for epoch in found)]
    figure = blank(4.4 * len(kinds), 4.0, "plotting a training")
    names = _drawn(found)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _curves(axes, kind, names, found)
    figure.legend(
        handles=_curve_legend(names), loc="outside upper center", ncols=6, frameon=False, fontsize=8
    )
    return save(figure, path)


def blank(width: float, height: float, purpose: str) -> Figure:
    """An empty figure that no window and no global state of matplotlib knows of.

    Args:
        width: in inches, as is the height.
        height: of the figure.
        purpose: what matplotlib is needed for, told where it is missing.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "viz", purpose) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Replaces the file at the path as a whole by the figure, in the format of its suffix, and returns the path."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:], dpi=150)
    write(path, content.getvalue())
    return path


def _pairs(evaluation: Any) -> Evaluation:
    """Return readouts with their accuracies, from an evaluation, a mapping, or such pairs themselves."""
    accuracy = getattr(evaluation, "accuracy", evaluation)
    try:
        return [
            (str(name), float(value))
            for name, value in (accuracy.items() if isinstance(accuracy, Mapping) else accuracy)
        ]
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"a method's evaluation is {evaluation!r}, not accuracies by readout. Hint: pass {{'SFF': sffx.evaluate(net, loader)}}"
        ) from cause


def _check(evaluations: Mapping[str, Evaluation]) -> None:
    if not any(evaluations.values()):
        raise InputError(
            "there is no accuracy to plot. Hint: pass {method: [(readout, accuracy), ...]}"
        )
    for method, evaluation in evaluations.items():
        for readout, accuracy in evaluation:
            if not 0 <= accuracy <= 1:
                raise InputError(
                    f"the accuracy of {readout!r} by {method!r} is {accuracy}, not between 0 and 1. Hint: percent / 100"
                )


def _readouts(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[str]]:
    return _parted(readout for evaluation in evaluations.values() for readout, _ in evaluation)


def _parted(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of blocks in order, and the others as they come, each once."""
    known = dict.fromkeys(names)
    blocks = sorted((name for name in known if name.startswith(BLOCK)), key=_depth)
    return blocks, [name for name in known if not name.startswith(BLOCK)]


def _depth(block: str) -> tuple[int, str]:
    number = block.removeprefix(BLOCK)
    return (int(number) if number.isdecimal() else 0, block)


def _widths(evaluations: Mapping[str, Evaluation]) -> list[float]:
    """Inches for the panel of the blocks and for the other one, in which every value is written out."""
    blocks, others = _readouts(evaluations)
    inches = (min(8.0, 1.6 + 0.35 * len(blocks)), len(others) * (0.6 + 0.4 * len(evaluations)))
    return [width for names, width in zip((blocks, others), inches, strict=True) if names]


def _fill(figure: Figure, evaluations: Mapping[str, Evaluation]) -> None:
    panels = [names for names in _readouts(evaluations) if names]
    axes = figure.subplots(
        1, len(panels), sharey=True, width_ratios=_widths(evaluations), squeeze=False
    )[0]
    for panel, names in zip(axes, panels, strict=True):
        _panel(panel, names, evaluations)
    axes[0].set_ylabel("accuracy")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    _legend(figure, evaluations)


def _panel(axes: Axes, names: Sequence[str], evaluations: Mapping[str, Evaluation]) -> None:
    blocks = names[0].startswith(BLOCK)
    for index, evaluation in enumerate(evaluations.values()):
        accuracies = dict(evaluation)
        # Apart from the blocks, methods stand side by side, so that equal accuracies do not hide each other.
        shift = 0.0 if blocks else 0.7 * ((index + 0.5) / len(evaluations) - 0.5)
        points = [
            (position + shift, accuracies[name])
            for position, name in enumerate(names)
            if name in accuracies
        ]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            linestyle="-" if blocks else "",
            **_style(index),
        )
        for x, y in [] if blocks else points:
            axes.annotate(
                f"{100 * y:.1f}",
                (x, y),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    _ticks(axes, names)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
    }


def _legend(figure: Figure, evaluations: Mapping[str, Evaluation]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=method, **_style(index)) for index, method in enumerate(evaluations)
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False
    )


def _ticks(axes: Axes, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / 20)
    axes.set_xticks(
        range(0, len(names), step), [name.removeprefix(BLOCK) for name in names[::step]]
    )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="y", color="#e3e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if names[0].startswith(BLOCK):
        axes.set_xlabel("block")


def _drawn(found: Sequence[Epoch]) -> list[str]:
    """The names of the lines: the blocks in order, then what stands for the whole net."""
    blocks, others = _parted(
        name
        for epoch in found
        for kind in PANELS
        for name in getattr(epoch, kind)
        if name != NOT_DRAWN
    )
    return [*blocks, *others]


def _curves(axes: Axes, kind: str, names: Sequence[str], found: Sequence[Epoch]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name in names:
        points = [
            (epoch.number + 1, getattr(epoch, kind)[name])
            for epoch in found
            if name in getattr(epoch, kind)
        ]
        marker = "." if len(found) < 30 else ""
        axes.plot(
            [x for x, _ in points], [y for _, y in points], marker=marker, **_curve(name, names)
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(PANELS[kind])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if kind == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    elif _spans_decades([value for epoch in found for value in getattr(epoch, kind).values()]):
        axes.set_yscale("log")
    axes.grid(axis="y", color="#e3e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether positive values lie so far apart that small ones could not be told from each other on a plain axis."""
    return min(values, default=0) > 0 and max(values) >= 10 * min(values)


def _curve(name: str, names: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    blocks, _ = _parted(names)
    if name not in blocks:
        return {"color": WHOLE.get(name, "#5f6b7a"), "linestyle": "--", "linewidth": 1.6}
    # The lightest of the scale would not be seen on white.
    return {
        "color": colormaps["viridis"](0.88 * blocks.index(name) / max(1, len(blocks) - 1)),
        "linewidth": 1.2,
    }


def _curve_legend(names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    blocks, others = _parted(names)
    few = (
        blocks if len(blocks) <= BLOCKS_NAMED else [blocks[0], blocks[len(blocks) // 2], blocks[-1]]
    )
    return [
        Line2D([], [], label=name.replace("_", " "), **_curve(name, names))
        for name in [*few, *others]
    ]
