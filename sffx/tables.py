"""Tables as text and as HTML, and numbers of bytes with their unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from sffx.errors import InputError, shown

KIB = 2**10
MIB = 2**20
GIB = 2**30
# Larger budgets would not fit the 64 bits in which torch counts bytes.
MOST_BYTES = 2**50

# From the largest to the smallest, the order in which a unit is looked for.
BYTE_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}

# Those that a user may write.
_READ_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its cell in the header.
        align: the side on which the cells line up, in text and in HTML.
        width: the smallest width in text, in characters. A wider cell widens the column.
    """

    title: str
    align: Literal["left", "right"] = "right"
    width: int = 0


def text_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, note: str = "") -> str:
    """Return a table as lines of text: the header, then one line for each row.

    Two spaces stand between columns, and no line ends in a space.

    Args:
        columns: the columns, in order.
        rows: the cells of each row, one for each column.
        note: text behind the header, for example "(8 samples)".

    Returns:
        The lines, without a newline at the end.
    """
    titles = [column.title for column in columns]
    widths = [column.width for column in columns]
    for row in (titles, *rows):
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], len(cell))
    lines = [_line(columns, widths, row) for row in (titles, *rows)]
    if note:
        lines[0] = f"{lines[0]}   {note}"
    return "\n".join(lines)


def html_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, caption: str = ""
) -> str:
    """Return the same table as an HTML element, for a notebook. Every text is escaped.

    Args:
        columns: the columns, in order; their `width` plays no part.
        rows: the cells of each row, one for each column.
        caption: a title for the table; "" gives none.
    """
    table = ElementTree.Element("table")
    if caption:
        ElementTree.SubElement(table, "caption").text = caption
    head = ElementTree.SubElement(ElementTree.SubElement(table, "thead"), "tr")
    for column in columns:
        ElementTree.SubElement(head, "th").text = column.title
    body = ElementTree.SubElement(table, "tbody")
    for row in rows:
        line = ElementTree.SubElement(body, "tr")
        for column, cell in zip(columns, row, strict=True):
            # Notebooks align cells to the right by default, so the side is always said.
            style = f"text-align: {column.align}"
            ElementTree.SubElement(line, "td", style=style).text = cell
    return ElementTree.tostring(table, encoding="unicode", method="html")


def byte_size(size: int) -> str:
    """Return a number of bytes in the largest fitting unit, with two decimals: "1.25 GiB"."""
    unit = _byte_unit(size)
    return f"{size / BYTE_UNITS[unit]:.2f} {unit}"


def short_byte_size(size: int) -> str:
    """Return a number of bytes with three significant digits: "1.25 GiB", "45.9 MiB", "12 B"."""
    unit = _byte_unit(size)
    if unit == "B":
        return f"{size} B"
    return f"{_three_digits(size / BYTE_UNITS[unit])} {unit}"


def read_byte_size(text: str | int) -> int:
    """Return the number of bytes that a text such as "2 GiB" or "500 MB" means.

    Raises:
        InputError: it cannot be read, or is not positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?i?B)?\s*", str(text), re.IGNORECASE)
    # 0 stands for what cannot be read.
    size = 0
    if match and not isinstance(text, bool):
        number, unit = match[1], match[2] or "B"
        try:
            size = int(float(number) * _READ_UNITS[unit.upper()])
        except ValueError:  # "1.2.3"
            size = 0
        except OverflowError:  # more than 308 digits
            size = MOST_BYTES + 1
    if not 1 <= size <= MOST_BYTES:
        problem = "cannot be read" if size < 1 else "is more than any machine has"
        raise InputError(
            f"the budget {shown(text)} {problem}. Hint: '2 GiB', '500 MB', or a number of bytes"
        )
    return size


def in_mib(size: int) -> str:
    """Return a number of bytes in MiB, whatever its size, so that a column compares: "0.25 MiB"."""
    return f"{size / MIB:.2f} MiB"


def short_number(number: int) -> str:
    """Return a number with three significant digits and its prefix: "11.7 M", "230 k", "64"."""
    # From 999.5 on, three digits would be printed as "1000".
    if number < 999.5:
        return str(number)
    size = number / 1000
    for prefix in ("k", "M", "G"):
        if size < 999.5:
            return f"{_three_digits(size)} {prefix}"
        size /= 1000
    return f"{_three_digits(size)} T"


def _line(columns: Sequence[Column], widths: Sequence[int], cells: Sequence[str]) -> str:
    """Return the cells of a row as a line, each as wide as its column."""
    padded = []
    for column, width, cell in zip(columns, widths, cells, strict=True):
        if column.align == "left":
            padded.append(cell.ljust(width))
        else:
            padded.append(cell.rjust(width))
    return GAP.join(padded).rstrip()


def _byte_unit(size: int) -> str:
    for unit, factor in BYTE_UNITS.items():
        if size >= factor:
            return unit
    return "B"


def _three_digits(size: float) -> str:
    # The bounds are those at which the printed text would get a fourth digit.
    if size < 9.995:
        return f"{size:.2f}"
    if size < 99.95:
        return f"{size:.1f}"
    return f"{size:.0f}"
