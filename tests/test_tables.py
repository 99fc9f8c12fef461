"""Tables as text and as HTML, and numbers of bytes with their unit."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from sffx.errors import InputError
from sffx.tables import (
    GIB,
    KIB,
    MIB,
    Column,
    byte_size,
    html_table,
    in_mib,
    read_byte_size,
    short_byte_size,
    short_number,
    text_table,
)

COLUMNS = (Column("block", "left"), Column("MACs"), Column("note", "left"))
ROWS = [("block_0", "12", "<first>"), ("classifier", "1,000", "")]


def test_text_lines_up_and_ends_in_no_space() -> None:
    assert text_table(COLUMNS, ROWS).splitlines() == [
        "block        MACs  note",
        "block_0        12  <first>",
        "classifier  1,000",
    ]


def test_a_column_is_at_least_as_wide_as_asked_for() -> None:
    columns = (Column("a", "left", width=5), Column("b", width=4))
    assert text_table(columns, [("x", "1"), ("y", "123456")]).splitlines() == [
        "a           b",
        "x           1",
        "y      123456",
    ]


def test_a_note_stands_behind_the_header() -> None:
    table = text_table((Column("loss"),), [("0.5000",)], note="(8 samples)")
    assert table.splitlines() == ["  loss   (8 samples)", "0.5000"]


def test_a_table_without_rows_is_its_header() -> None:
    assert text_table(COLUMNS, []) == "block  MACs  note"


@pytest.mark.parametrize("table", [text_table, html_table])
def test_a_row_has_a_cell_for_each_column(table: object) -> None:
    with pytest.raises(ValueError, match="zip"):
        table(COLUMNS, [("block_0", "12")])  # type: ignore[operator]


def test_html_has_the_same_cells() -> None:
    table = ElementTree.fromstring(html_table(COLUMNS, ROWS, caption="a & b"))
    assert [row.tag for row in table] == ["caption", "thead", "tbody"]
    assert table[0].text == "a & b"
    assert [cell.text for cell in table[1][0]] == ["block", "MACs", "note"]
    cells = [[cell.text or "" for cell in row] for row in table[2]]
    assert cells == [list(row) for row in ROWS]


def test_html_lines_up_as_text_does() -> None:
    table = ElementTree.fromstring(html_table(COLUMNS, ROWS))
    sides = [cell.get("style") for cell in table.find("tbody")[0]]
    assert sides == ["text-align: left", "text-align: right", "text-align: left"]


def test_html_escapes_every_text() -> None:
    attack = "<script>alert('x')</script>&\""
    html = html_table((Column(attack),), [(attack,)], caption=attack)
    assert "<script" not in html
    texts = [element.text for element in ElementTree.fromstring(html).iter() if element.text]
    assert texts == [attack] * 3


def test_html_without_a_caption() -> None:
    assert "caption" not in html_table(COLUMNS, ROWS)


@pytest.mark.parametrize(
    ("size", "long", "short", "mib"),
    [
        (0, "0.00 B", "0 B", "0.00 MiB"),
        (56, "56.00 B", "56 B", "0.00 MiB"),
        (1023, "1023.00 B", "1023 B", "0.00 MiB"),
        (KIB, "1.00 KiB", "1.00 KiB", "0.00 MiB"),
        (802_816, "784.00 KiB", "784 KiB", "0.77 MiB"),
        (MIB - 1, "1024.00 KiB", "1024 KiB", "1.00 MiB"),
        (4_812_800, "4.59 MiB", "4.59 MiB", "4.59 MiB"),
        (10_437_632, "9.95 MiB", "9.95 MiB", "9.95 MiB"),
        (45 * MIB + 900 * KIB, "45.88 MiB", "45.9 MiB", "45.88 MiB"),
        (512 * MIB, "512.00 MiB", "512 MiB", "512.00 MiB"),
        (GIB + 256 * MIB, "1.25 GiB", "1.25 GiB", "1280.00 MiB"),
        (3000 * GIB, "3000.00 GiB", "3000 GiB", "3072000.00 MiB"),
    ],
)
def test_bytes_have_their_unit(size: int, long: str, short: str, mib: str) -> None:
    assert (byte_size(size), short_byte_size(size), in_mib(size)) == (long, short, mib)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (64, "64"),
        (999, "999"),
        (1000, "1.00 k"),
        (9_536, "9.54 k"),
        (9_994, "9.99 k"),
        (9_995, "10.0 k"),
        (99_960, "100 k"),
        (230_144, "230 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (11_689_512, "11.7 M"),
        (1_814_073_344, "1.81 G"),
        (2_500_000_000_000, "2.50 T"),
        (12 * 10**12, "12.0 T"),
        (5 * 10**15, "5000 T"),
    ],
)
def test_numbers_keep_three_digits(number: int, text: str) -> None:
    assert short_number(number) == text


def test_a_budget_of_hundreds_of_digits_is_more_than_any_machine_has() -> None:
    with pytest.raises(InputError, match="is more than any machine has"):
        read_byte_size("9" * 400)
