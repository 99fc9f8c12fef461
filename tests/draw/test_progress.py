"""Accuracies and learning rates of a training, in the colours of a drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sffx.blocks import BlockPlan
from sffx.draw.graph import block_graph
from sffx.draw.page import page
from sffx.draw.progress import ACCURACY_COLOURS, RATE_COLOURS, Progress
from sffx.draw.render import draw
from tests.draw.drawn import drawn

ACCURACY = {"block_0": 0.5, "block_1": 0.75, "classifier": 0.9, "ensemble": 0.8, "last": 0.75}


def test_colours_go_from_the_lowest_to_the_highest() -> None:
    progress = Progress(
        ACCURACY, {"block_0": 1e-4, "block_1": 1e-3, "classifier": 1e-2, "other": 0.0}
    )
    assert [progress.accuracy_colour(name) for name in ("block_0", "classifier")] == list(
        ACCURACY_COLOURS
    )
    assert [progress.rate_colour(name) for name in ("block_0", "classifier", "other")] == [
        *RATE_COLOURS,
        RATE_COLOURS[0],
    ]
    middle = [int(progress.rate_colour("block_1")[at : at + 2], 16) for at in (1, 3, 5)]
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in RATE_COLOURS]
    assert middle == pytest.approx(
        [(low + high) / 2 for low, high in zip(*ends, strict=True)], abs=0.5
    )


def test_where_all_are_equal_no_block_looks_the_worst() -> None:
    assert (
        Progress({"block_0": 0.5, "classifier": 0.5}).accuracy_colour("block_0")
        == ACCURACY_COLOURS[1]
    )


def test_boxes_have_the_colours_and_tell_the_figures(small: BlockPlan) -> None:
    progress = Progress(ACCURACY, {"block_0": 1e-4, "block_1": 1e-2})
    graph = drawn(block_graph(small, progress=progress))
    block, classifier = (graph.nodes[name] for name in ("block_0", "classifier"))
    assert [block["fillcolor"], classifier["fillcolor"]] == list(ACCURACY_COLOURS)
    assert "accuracy 50.0 %" in block["label"]
    assert (
        f'BGCOLOR="{RATE_COLOURS[0]}"><FONT COLOR="#1f2933" POINT-SIZE="10">learning rate 1.0e-04'
        in block["label"]
    )
    assert "no learning rate" in classifier["label"]
    title = graph.subgraphs["cluster_plan"]["label"]
    assert "accuracy: classifier 90.0 %, ensemble 80.0 %" in title
    assert "50.0 %</FONT></TD><TD" in graph.attributes["label"]  # the scale of the legend


def test_a_deep_net_with_accuracies_is_not_folded(chain: Any) -> None:
    accuracy = {block.target: 0.5 for block in chain(20).all_blocks}
    assert " × " not in block_graph(chain(20), progress=Progress(accuracy)).source
    assert 'id="run_block_0" open' in page(chain(20), progress=Progress(accuracy)).replace(
        'class="box run" ', ""
    )


def test_the_page_has_the_colours_too(small: BlockPlan) -> None:
    text = page(small, progress=Progress(ACCURACY, {"block_0": 1e-4}))
    assert f'id="block_0" style="border-left: 12px solid {ACCURACY_COLOURS[0]}"' in text
    assert (
        f'<span class="badge" style="background: {RATE_COLOURS[1]}">learning rate 1.0e-04</span>'
        in text
    )


def test_a_training_without_accuracies_of_blocks_is_drawn(small: BlockPlan) -> None:
    progress = Progress({"ensemble": 0.5})
    assert "ensemble 50.0 %" in block_graph(small, progress=progress).source
    assert "ensemble 50.0 %" in page(small, progress=progress)


def test_draw_takes_progress_in_every_detail(small: BlockPlan, tmp_path: Path) -> None:
    for detail in ("blocks", "modules", "nodes"):
        path = draw(small, tmp_path / f"{detail}.dot", detail=detail, progress=Progress(ACCURACY))
        assert ACCURACY_COLOURS[0] in path.read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_place_on_the_scale(small: BlockPlan, value: float) -> None:
    """A diverged training. Its nan was drawn in the colour of the best, or ended in an error."""
    progress = Progress(
        {"block_0": value, "block_1": 0.2, "classifier": 0.8}, {"block_0": value, "block_1": 0.1}
    )
    assert progress.accuracy_colour("block_0") == ""
    colours = [progress.accuracy_colour(name) for name in ("block_1", "classifier")]
    assert colours == list(ACCURACY_COLOURS)
    graph = drawn(block_graph(small, progress=progress))
    assert f"accuracy {value} %" in graph.nodes["block_0"]["label"]
    assert "20.0 %</FONT></TD><TD" in graph.attributes["label"]
    assert "background: ;" not in page(small, progress=progress)
    assert 'background: "' not in page(small, progress=progress)


def test_without_accuracies_of_the_whole_net_none_are_announced(small: BlockPlan) -> None:
    progress = Progress({"block_0": 0.5})
    assert "accuracy:" not in block_graph(small, progress=progress).source
    assert "accuracy:" not in page(small, progress=progress).replace("box: accuracy", "")
