"""Colours, letters and sizes that all drawings of plans share."""

from __future__ import annotations

INK = "#1f2933"
FAINT = "#66727f"
RED = "#c0392b"
BLUE = "#2b6cb0"
GREY = "#5f6b7a"
AMBER = "#9a5b00"
GREEN = "#4a6b4f"
TEAL = "#0f6674"

# Widths of texts, in characters. They fit the widths of cells below at the sizes of the letters.
NAME_WIDTH = 37
MODULE_WIDTH = 30
VALUE_WIDTH = 24
LINE_WIDTH = 66
NOTE_WIDTH = 90

# Widths of cells, in points.
NAME_POINTS = 268
TARGET_POINTS = 70
MARK_POINTS = 60

FONT = "Helvetica,Arial,sans-serif"

GRAPH_STYLE = {
    "bgcolor": "white",
    "charset": "UTF-8",
    "fontname": FONT,
    "labelloc": "b",
    "labeljust": "l",
    "newrank": "true",
    "nodesep": "0.3",
    "pad": "0.3",
    "ranksep": "0.2",
}
NODE_STYLE = {
    "shape": "box",
    "style": "rounded,filled",
    "margin": "0.14,0.08",
    "fontname": FONT,
}
EDGE_STYLE = {"arrowsize": "0.7", "penwidth": "1.2", "fontname": FONT}

# A node that is only its label, without a box around it.
PLAIN_TEXT = {"shape": "plain", "style": ""}
