"""The picture of accuracies: what matplotlib draws, and what is refused."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from sffx.errors import InputError, MissingExtra
from sffx.plots.results import plot_accuracy
from sffx.runtime.evaluate import Evaluation

EVALUATIONS = {
    "SFF": [("block_0", 0.34), ("block_1", 0.45), ("ensemble", 0.494), ("classifier", 0.48)],
    "BP": [("classifier", 0.501)],
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved during the test."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved: list[Any] = []
    save = figure.savefig

    def remember(self: Any, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(figure, "savefig", remember)
    return saved


def points(axes: Any) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in axes.lines]


def test_blocks_are_a_line_and_the_rest_stands_apart(figures: list[Any], tmp_path: Path) -> None:
    plot_accuracy(EVALUATIONS, tmp_path / "accuracy.png")
    blocks, others = figures[0].axes
    assert points(blocks) == [[0.34, 0.45], []]
    assert points(others) == [[0.494, 0.48], [0.501]]
    assert [label.get_text() for label in blocks.get_xticklabels()] == ["0", "1"]
    assert [label.get_text() for label in others.get_xticklabels()] == ["ensemble", "classifier"]
    assert [text.get_text() for text in others.texts] == ["49.4", "48.0", "50.1"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["SFF", "BP"]


def test_blocks_are_in_the_order_of_depth(figures: list[Any], tmp_path: Path) -> None:
    plot_accuracy(
        {"a": [("block_10", 0.9), ("block_2", 0.5), ("block_0", 0.1)]}, tmp_path / "accuracy.svg"
    )
    (blocks,) = figures[0].axes
    assert points(blocks) == [[0.1, 0.5, 0.9]]


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".pdf", b"%PDF-")]
)
def test_each_format_is_written(tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    assert plot_accuracy(EVALUATIONS, tmp_path / f"accuracy{suffix}").read_bytes().startswith(start)


def test_pyplot_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plot_accuracy(EVALUATIONS, tmp_path / "accuracy.png").exists()


def test_many_methods_look_different(figures: list[Any], tmp_path: Path) -> None:
    methods = {f"method {index}": {"block_0": 0.5} for index in range(20)}
    plot_accuracy(methods, tmp_path / "accuracy.svg")
    lines = figures[0].axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(methods)


def test_dollars_in_names_are_no_formulas(tmp_path: Path) -> None:
    """`$x$` would become an italic x, and an unknown command an error."""
    pytest.importorskip("matplotlib")
    methods = {r"$\nothing$": {"from $5 to $6_a": 0.5}}
    drawn = plot_accuracy(methods, tmp_path / "accuracy.svg").read_text()
    assert r"<!-- $\nothing$ -->" in drawn
    assert "<!-- from $5 to $6_a -->" in drawn


@pytest.mark.parametrize("accuracy", [50.1, -0.1, math.nan])
def test_an_accuracy_that_is_none_is_refused(tmp_path: Path, accuracy: float) -> None:
    with pytest.raises(InputError, match=r"'classifier' by 'BP' is .*, not between 0 and 1"):
        plot_accuracy({"BP": [("classifier", accuracy)]}, tmp_path / "accuracy.png")


@pytest.mark.parametrize("evaluations", [{}, {"BP": []}])
def test_nothing_to_plot_is_refused(
    tmp_path: Path, evaluations: dict[str, list[tuple[str, float]]]
) -> None:
    with pytest.raises(InputError, match="no accuracy to plot"):
        plot_accuracy(evaluations, tmp_path / "accuracy.png")


def test_a_single_evaluation_is_asked_for_its_name(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"evaluations is of type Evaluation, not a mapping by methods\. Hint: pass {'SFF': ",
    ):
        plot_accuracy(
            Evaluation({"classifier": 0.5}, {"classifier": 1.0}, 2), tmp_path / "accuracy.png"
        )


@pytest.mark.parametrize(
    "evaluations", [{"block_0": 0.5}, {"SFF": "abc"}, {"SFF": {"block_0": "high"}}]
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, evaluations: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"a method's evaluation is .*, not accuracies by readout\. Hint: pass"
    ):
        plot_accuracy(evaluations, tmp_path / "accuracy.svg")


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.svg, \.png, \.pdf$"):
        plot_accuracy(EVALUATIONS, tmp_path / "accuracy.dot")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"'matplotlib'.*sffx\[viz\]"):
        plot_accuracy(EVALUATIONS, tmp_path / "accuracy.png")
