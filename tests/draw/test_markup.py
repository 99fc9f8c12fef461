"""HTML-like labels: what is escaped, and what Graphviz reads."""

from __future__ import annotations

import pytest

from sffx.draw.graph import new_graph
from sffx.draw.markup import cell, label, row, rows_label, table, text
from tests.draw.drawn import drawn


@pytest.mark.parametrize(
    ("content", "safe"),
    [
        ("a<b> & c", "a&lt;b&gt; &amp; c"),
        ('say "x"', 'say "x"'),
        ("C:\\New", "C:\\\\New"),
        ("two\n  lines\x00\ud800", "two lines"),
        ("", " "),
        ("\n", " "),
    ],
)
def test_a_text_holds_nothing_that_graphviz_reads(content: str, safe: str) -> None:
    expected = f'<<FONT COLOR="#123456" POINT-SIZE="7">{safe}</FONT>>'
    assert label(text(content, "#123456", 7)) == expected


def test_attributes_are_escaped() -> None:
    markup = label(cell(COLOR='"><B>'))
    assert markup == '<<TD COLOR="&quot;&gt;&lt;B&gt;"></TD>>'


def test_bold_letters_are_in_an_element_of_their_own() -> None:
    assert label(text("x", bold=True)).startswith("<<B><FONT ")


def test_an_attribute_of_a_table_replaces_the_plain_one() -> None:
    assert 'BORDER="1" CELLBORDER="0"' in label(table([], BORDER="1"))


@pytest.mark.parametrize("content", ["", "a<b>&c", "\\N", "]]>", "<!--", "\x1b[0m"])
def test_graphviz_reads_a_label_with_any_text(content: str) -> None:
    graph = new_graph()
    graph.node("node", label=rows_label([row(cell(text(content))), row(cell())]))
    assert set(drawn(graph, "json").nodes) == {"node"}
