"""Streams side by side: only where a block reads the output before does a picture say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.blocks import BlockPlan
from sffx.draw.clusters import detailed_graph
from sffx.draw.crossings import crossings
from sffx.draw.fold import Run, fold
from sffx.draw.graph import block_graph
from sffx.draw.page import page
from sffx.draw.words import NOT_READ
from tests.draw.drawn import drawn
from tests.draw.test_page import parse


def towers(plan: BlockPlan, length: int) -> BlockPlan:
    """Return a chain as towers of a length. All of them read x, and the classifier joins them."""
    blocks = []
    ends = []
    for index, block in enumerate(plan.blocks):
        blocks.append(replace(block, inputs=("x",)) if index % length == 0 else block)
        if index % length == length - 1:
            ends.append(block.output)
    classifier = replace(plan.classifier, inputs=tuple(ends))
    return replace(plan, blocks=tuple(blocks), classifier=classifier)


def gaps(plan: BlockPlan) -> list[tuple[str, str]]:
    """The pairs of neighbours of which the second one does not read the first one."""
    found = []
    for block, following in zip(plan.blocks, plan.all_blocks[1:], strict=True):
        if block.output not in following.inputs:
            found.append((block.target, following.target))
    return found


@pytest.fixture
def two_streams(chain: Callable[[int], BlockPlan]) -> BlockPlan:
    """Two towers of two blocks."""
    return towers(chain(4), 2)


def test_a_cut_leads_to_a_block_that_reads_it(two_streams: BlockPlan) -> None:
    assert gaps(two_streams) == [("block_1", "block_2")]
    graph = drawn(block_graph(two_streams))
    assert graph.ends("gap") == [("block_1", "block_2")]
    assert graph.ends("cut") == [
        ("block_0", "block_1"),
        ("block_2", "block_3"),
        ("block_3", "classifier"),
    ]
    assert NOT_READ in graph.one("gap")["label"]
    assert graph.ends("input") == [("input_x", "block_0"), ("input_x", "block_2")]


def test_the_heading_of_a_block_stands_for_what_enters_it(two_streams: BlockPlan) -> None:
    graph = drawn(detailed_graph(two_streams, "modules"))
    assert graph.ends("gap") == [("block_1/out_1", "block_2")]
    assert ("block_1/out_1", "block_2") not in graph.ends("cut")
    assert graph.ends("input") == [("input_x", "block_0"), ("input_x", "block_2")]
    assert graph.ends("side detached") == [("block_1/out_1", "classifier/classifier")]
    assert "side value, detached" in graph.attributes["label"]


def test_the_page_says_so_too(two_streams: BlockPlan) -> None:
    texts = [
        element.text
        for element in parse(page(two_streams))
        if "cut" in (element.attributes.get("class") or "").split()
    ]
    assert [text == NOT_READ for text in texts] == [False, True, False, False]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_blocks_of_several_towers_are_no_run(
    chain: Callable[[int], BlockPlan], length: int
) -> None:
    """Folded, the outputs of the towers inside would come from nowhere."""
    plan = towers(chain(12), length)
    folded = fold(plan)
    runs = [block for block in folded if isinstance(block, Run)]
    assert [len(run.blocks) for run in runs] == ([4, 4, 4] if length == 4 else [])
    outside = [crossing.names for crossing in crossings(folded) if crossing.is_from_outside]
    assert outside == [("x",)]


@pytest.mark.parametrize("rows", [3, 14])
def test_signs_between_columns_have_the_edge_of_a_gap(
    chain: Callable[[int], BlockPlan], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("sffx.draw.graph.ROWS", rows)
    plan = towers(chain(6), 3)
    graph = drawn(block_graph(plan))
    if rows == 3:
        expected = [("block_2", "to_block_3"), ("from_block_2", "block_3")]
    else:
        expected = [("block_2", "block_3")]
    assert graph.ends("gap") == sorted(expected)


class Branches(nn.Module):
    """Residual layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.last = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([x + layer(x).relu() for layer in self.layers], 1))


def test_a_real_net_of_branches() -> None:
    plan = sffx.plan(Branches(), "residual", torch.zeros(2, 4))
    assert len(gaps(plan)) == 3
    assert drawn(block_graph(plan)).ends("gap") == gaps(plan)
    assert not any(isinstance(block, Run) for block in fold(plan))
    assert page(plan).count('class="cut gap"') == 3
    sources = drawn(detailed_graph(plan, "modules")).nodes
    assert [name for name in sources if name.startswith("value_")] == []
