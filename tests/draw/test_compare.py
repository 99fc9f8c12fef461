"""Policies side by side: the table, the drawing, and the command."""

from __future__ import annotations

import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sffx.blocks import BlockPlan
from sffx.cli.viz import _policies, main
from sffx.draw.compare import comparison, draw_comparison
from sffx.errors import InputError

NET = """
from torch import nn
net = nn.Sequential(
    *(layer for width in (3, 8, 8) for layer in (nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_a_line_for_each_policy_tells_its_largest_block(
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
    pytest.importorskip("pygraphviz")
    plans = [chain(2), replace(chain(5), policy="a<b>&c")]
    picture = xml.parse(draw_comparison(plans, tmp_path / "policies.svg")).getroot()
    shown = {
        element.text: element.attrib for element in picture.iter() if element.tag.endswith("}text")
    }
    for left, right in (("residual", "a<b>&c"), ("layers.0", "5 × layers.0 … layers.4")):
        assert float(shown[left]["x"]) < float(shown[right]["x"])
        assert abs(float(shown[left]["y"]) - float(shown[right]["y"])) < 4


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan to compare"):
        draw_comparison([], tmp_path / "policies.dot")


def test_a_page_of_a_comparison_is_refused(small: BlockPlan, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'\.html' is unknown. Hint: use one of \.svg, \.png, \.pdf, \.dot, \.gv"
    ):
        draw_comparison([small], tmp_path / "policies.html")


def test_commas_in_brackets_belong_to_a_policy() -> None:
    assert _policies("residual, stages(4),other(a,b)") == ["residual", "stages(4)", "other(a,b)"]


@pytest.mark.parametrize("text", ["residual", "residual,", ""])
def test_one_policy_is_no_comparison(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model.py", "--compare", text])
    assert (
        f"{text!r} is not a list of policies such as residual,batchnorm" in capsys.readouterr().err
    )


def test_the_command_prints_the_table_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(NET)
    arguments = ["model.py", "--input", "1,3,8,8", "--compare", "residual,batchnorm"]
    assert main(arguments) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["residual", "3"],
        ["batchnorm", "3"],
    ]
    assert [path.name for path in Path().iterdir()] == ["model.py"]
    assert main([*arguments, "-o", "policies.dot"]) == 0
    assert "batchnorm" in Path("policies.dot").read_text()


def test_a_cut_net_has_nothing_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(
        f"{NET}\nimport sffx, torch\nnet = sffx.transform(net, example_input=torch.zeros(1, 3, 8, 8))"
    )
    assert main(["model.py", "--compare", "residual,batchnorm"]) == 2
    assert "cut already, by the policy residual" in capsys.readouterr().err
