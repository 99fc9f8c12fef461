"""Policies side by side: the table and the drawing."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sffx.blocks import BlockPlan
from sffx.draw.compare import comparison, draw_comparison
from sffx.errors import InputError
from tests.draw.drawn import need_graphviz


def test_a_line_for_each_policy_has_its_largest_block(
    small: BlockPlan, resnet18: BlockPlan
) -> None:
    head, columns, *lines = comparison([resnet18, replace(small, policy="other")]).splitlines()
    assert head == "ResNet, 1000 classes, by 2 policies"
    assert columns.split("  ")[0] == "policy"
    assert [line.split() for line in lines] == [
        ["residual", "9", "conv1", "9.95", "MiB", "28.5", "MiB", "35%", "4.72", "M"],
        ["other", "2", "layers.0", "512", "B", "1.50", "KiB", "33%", "72"],
    ]


def test_the_columns_stand_side_by_side(chain: Callable[[int], BlockPlan], tmp_path: Path) -> None:
    need_graphviz()
    plans = [chain(2), replace(chain(5), policy="a<b>&c")]
    picture = xml.parse(draw_comparison(plans, tmp_path / "policies.svg")).getroot()
    shown = {
        element.text: element.attrib for element in picture.iter() if element.tag.endswith("}text")
    }
    for left, right in (("residual", "a<b>&c"), ("layers.0", "5 × layers.0 … layers.4")):
        assert float(shown[left]["x"]) < float(shown[right]["x"])
        assert abs(float(shown[left]["y"]) - float(shown[right]["y"])) < 4


def test_the_bars_have_a_scale(small: BlockPlan, resnet18: BlockPlan, tmp_path: Path) -> None:
    text = draw_comparison([small, resnet18], tmp_path / "policies.dot").read_text()
    assert "the longest bar is 9.95 MiB<" in text


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan to compare"):
        draw_comparison([], tmp_path / "policies.dot")


def test_a_page_of_a_comparison_is_refused(small: BlockPlan, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'\.html' is unknown. Hint: use one of \.svg, \.png, \.pdf, \.dot, \.gv"
    ):
        draw_comparison([small], tmp_path / "policies.html")
