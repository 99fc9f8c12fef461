"""HTML-like labels of Graphviz, made of elements, which escape every text and attribute."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, tostring

from sffx.draw.style import INK
from sffx.draw.words import printable


def text(content: str, colour: str = INK, size: int = 10, bold: bool = False) -> Element:
    """Return a text in one line.

    Args:
        content: anything; white space and characters that do not print become single spaces.
        colour: as "#rrggbb".
        size: of the letters, in points.
        bold: whether the letters are bold.
    """
    font = Element("FONT", {"COLOR": colour, "POINT-SIZE": str(size)})
    font.text = _plain(content)
    if not bold:
        return font
    strong = Element("B")
    strong.append(font)
    return strong


def line_break() -> Element:
    """Return the end of a line that is aligned to the left."""
    return Element("BR", {"ALIGN": "LEFT"})


def cell(content: Element | None = None, **attributes: str) -> Element:
    """Return a cell of a table with its attributes, empty where there is no content."""
    element = Element("TD", attributes)
    if content is not None:
        element.append(content)
    return element


def left_cell(content: Element, **attributes: str) -> Element:
    """Return a cell whose content stands at its left."""
    return cell(content, ALIGN="LEFT", **attributes)


def row(*cells: Element) -> Element:
    """Return a row of cells."""
    element = Element("TR")
    element.extend(cells)
    return element


def line(content: Element, span: int = 1) -> Element:
    """Return a row with one cell, which spans so many columns."""
    return row(left_cell(content, COLSPAN=str(span)))


def table(rows: Sequence[Element], **attributes: str) -> Element:
    """Return a table without lines; the attributes add to these or replace them."""
    # The shape of a node draws the box around its label.
    plain = {"BORDER": "0", "CELLBORDER": "0", "CELLSPACING": "0"}
    element = Element("TABLE", plain | attributes)
    element.extend(rows)
    return element


def label(*elements: Element) -> str:
    """Return the elements as the value of a label: markup in angle brackets."""
    markup = ""
    for element in elements:
        # Graphviz refuses the short form of an empty cell, <TD />.
        markup += tostring(element, encoding="unicode", short_empty_elements=False)
    return f"<{markup}>"


def rows_label(rows: Sequence[Element]) -> str:
    """Return rows as the label of a node or an edge."""
    return label(table(rows, CELLPADDING="1"))


def _plain(content: str) -> str:
    words = printable(content).split()
    # Graphviz replaces \N, \G and others in HTML-like labels as well, so a backslash is doubled.
    line = " ".join(words).replace("\\", "\\\\")
    # Graphviz refuses an empty font element.
    return line or " "
