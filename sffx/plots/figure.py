"""Figures of matplotlib that no window and no global state knows of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.errors import MissingExtra
from sffx.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart. Each has a marker for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

GRID = "#e3e7eb"


def blank(width: float, height: float, purpose: str) -> Figure:
    """Return an empty figure.

    Args:
        width: in inches.
        height: in inches.
        purpose: for which matplotlib is needed; an error names it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "viz", purpose) from error
    # Not pyplot, which keeps every figure and chooses a window system.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: object) -> str:
    """Return a text of the caller's, in which matplotlib reads no formulas: "US$" stays "US$"."""
    return str(text).replace("$", r"\$")


def point_style(index: int) -> dict[str, Any]:
    """Return the colour and the marker of one of several methods; no two of the first 49 agree."""
    turns = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + turns) % len(MARKERS)],
        "markersize": 5,
    }


def save(figure: Figure, path: Path) -> Path:
    """Replace a file as a whole by the figure, in the format of its suffix, and return the path."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower()[1:], dpi=150)
    write(path, content.getvalue())
    return path


def open_frame(axes: Axes) -> None:
    """Take away the lines at the top and at the right, and draw horizontal lines for the eye."""
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def in_percent(axes: Axes) -> None:
    """Label the vertical axis of shares in percent."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
