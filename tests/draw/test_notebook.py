"""Plans and evaluations as tables in a notebook."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from dataclasses import replace

import pytest

from sffx.blocks import BlockPlan
from sffx.runtime.evaluate import Evaluation


def cells(html: str) -> list[list[str]]:
    """The texts of the rows; what is no well-formed markup raises."""
    table = xml.fromstring(f"<body>{html}</body>").find("table")
    assert table is not None
    return [[cell.text or "" for cell in row] for row in table.iter("tr")]


def test_a_plan_has_the_rows_that_it_prints(resnet18: BlockPlan) -> None:
    head, first, *_, last = cells(resnet18._repr_html_())
    assert head == ["block", "modules", "cut after", "output", "parameters", "MACs", "kept/sample"]
    assert first == ["block_0", "conv1", "out_0", "64x56x56", "9,536", "118,013,952", "9.95 MiB"]
    assert last[:2] == ["classifier", "fc"]
    assert len(cells(resnet18._repr_html_())) == 11


def test_the_remarks_of_a_plan_stand_below_its_table(skipping: BlockPlan) -> None:
    html = replace(skipping, notes=("a <b> & c",))._repr_html_()
    remarks = [paragraph.text for paragraph in xml.fromstring(f"<body>{html}</body>").iter("p")]
    assert remarks == ["crosses the cut after block_0: mask, skip", "note: a <b> & c"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b", '"quoted"', "'"])
def test_names_are_escaped(small: BlockPlan, name: str) -> None:
    odd = replace(
        small,
        model=name,
        policy=name,
        blocks=(replace(small.blocks[0], name=name), small.blocks[1]),
    )
    assert cells(odd._repr_html_())[1][1] == name
    assert cells(Evaluation({name: 0.5}, {name: 1.0}, 2)._repr_html_())[1] == [
        name,
        "50.00%",
        "1.0000",
    ]


def test_an_evaluation_has_a_row_for_each_readout() -> None:
    evaluation = Evaluation(
        {"block_0": 0.25, "ensemble": 0.5}, {"block_0": 1.5, "ensemble": 1.25}, 8
    )
    assert cells(evaluation._repr_html_()) == [
        ["", "accuracy", "loss"],
        ["block_0", "25.00%", "1.5000"],
        ["ensemble", "50.00%", "1.2500"],
    ]
    assert "8 samples" in evaluation._repr_html_()
