"""A plan's record of its blocks, their nodes and their heads; the oracle is the traced graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.blocks import Options
from sffx.compiler.analyse import analyse
from sffx.compiler.partition import partition
from sffx.compiler.policies import layer
from sffx.compiler.trace.trace import trace
from sffx.errors import InputError
from sffx.parts import listed_blocks
from sffx.tasks import Classification, Regression
from tests.toys import Chain, Residual, TwoBranches, TwoInputs

IMAGE = torch.zeros(1, 3, 8, 8)


class Gated(nn.Module):
    """A convolution, a squeeze-and-excitation gate of two layers, a sum with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
            nn.Conv2d(2, 8, 1),
        )
        self.left, self.right, self.shortcut = (
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x * self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.right(self.left(x).relu()) + self.shortcut(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "example", "joins"),
    [
        (Chain(), IMAGE, {}),
        (Residual(), IMAGE, {"add": ("sum", (4, 0)), "add_1": ("sum", (4, 0))}),
        (TwoBranches(), IMAGE, {"cat": ("cat", (1, 1))}),
        (Gated(), IMAGE, {"mul": ("product", (0, 2)), "add": ("sum", (2, 1))}),
        (
            TwoInputs(),
            (torch.zeros(1, 6), torch.zeros(1, 5)),
            {},
        ),  # paths that start at two inputs never parted
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_joins_and_the_layers_on_their_paths(model, example, joins):
    found = [
        node for block in sffx.plan(model, example_input=example).all_blocks for node in block.joins
    ]
    assert {node.name: (node.join, node.paths) for node in found} == joins


@pytest.mark.parametrize(
    "model", [Chain(), Residual(), TwoBranches(), Gated()], ids=lambda model: type(model).__name__
)
def test_the_nodes_read_what_the_traced_graph_says(model):
    analysis = analyse(trace(model, IMAGE))
    traced = {node.name: node for node in analysis.trace.graph.nodes}
    for block in partition(analysis, layer(analysis, Options()), Options()).all_blocks:
        assert tuple(node.name for node in block.graph) == block.nodes
        for node in block.graph:
            assert node.reads == tuple(arg.name for arg in traced[node.name].all_input_nodes)
            assert node.is_module == (traced[node.name].op == "call_module")
        assert tuple(node.call for node in block.graph if node.is_module) == block.modules


def test_the_heads_are_those_that_the_model_was_cut_with():
    asked = {"goodness": "sff", "kernel_size": 3, "norm": "none"}
    assert sffx.transform(Residual(), example_input=IMAGE, **asked).plan.options == Options(**asked)
    assert sffx.transform(Residual(), example_input=IMAGE, goodness="cwc").plan.options == Options(
        goodness="cwc"
    )
    assert (
        sffx.plan(Residual(), example_input=IMAGE).options
        == sffx.transform(Residual(), example_input=IMAGE).plan.options
        == Options()
    )


class Shares(nn.Module):
    """Five layers with one module between them."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.layers, self.head = (
            shared,
            nn.ModuleList(nn.Linear(6, 6) for _ in range(5)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = torch.relu(self.shared(each(x)))
        return self.head(x)


class Shift(nn.Module):
    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.shift.add_(1)
        return x + self.shift


def test_buffers_that_nobody_writes_may_be_used_on_both_sides_of_a_cut():
    x = torch.zeros(2, 6)
    assert len(sffx.plan(Shares(Shift(counts=False)), "layer", x)) == 5
    for shared in (Shift(counts=True), nn.PReLU(), nn.BatchNorm1d(6)):
        plan = sffx.plan(Shares(shared), "layer", x)
        assert len(plan) == 1
        assert (
            "no cut can lie between uses of shared: what learns belongs to one block" in plan.notes
        )


def test_one_logit_is_a_number_and_no_class():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    plan = sffx.plan(model, "layer")
    assert plan.task == Regression()
    assert any("for one logit of two classes pass task=" in note for note in plan.notes)
    with pytest.raises(
        InputError, match=r"returns one logit.*Hint: for two classes, give it two logits"
    ):
        sffx.plan(model, "layer", task=Classification())


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ((), ""),
        ((3,), "block_3"),
        ((0, 1, 2, 3), "block_0, block_1, block_2, block_3"),
        (tuple(range(13)), "block_0 to block_12"),
        ((0, 2, 3, 4, 5, 6, 8), "block_0, block_2 to block_6, block_8"),
    ],
)
def test_a_long_row_of_blocks_is_named_by_its_ends(indices: tuple[int, ...], words: str) -> None:
    assert listed_blocks([f"block_{index}" for index in indices]) == words


class _DrawsForNothing(nn.Module):
    """Draws before each layer whether to leave it out, and never does, as with layerdrop=0."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer_ in self.layers:
            self.draw(x)
            x = x + F.dropout(layer_(x), 0.5, self.training)
        return self.head(x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.rand([]),
        lambda x: torch.rand(x.shape[0]) < 0.0,
        lambda x: torch.randn(2, 3),
        lambda x: torch.randint(5, (2,)),
    ],
)
def test_a_draw_that_nothing_uses_stays_between_those_of_the_layers(draw: Any) -> None:
    model = _DrawsForNothing(draw).train()
    x = torch.randn(5, 6)
    net = sffx.transform(model, "layer", x, norm="none").train()
    assert len(net.plan) == 3
    assert not any("other random numbers" in note for note in net.plan.notes)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(net(x)[-1], expected)
