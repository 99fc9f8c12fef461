"""Stages of a cut model. The oracle is the cut model's own forward."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, fx

import sffx
from sffx.blocks import Value
from sffx.inputs import bind
from sffx.runtime.stage import stages_of
from sffx.runtime.walk import input_values, walk, walk_attached
from tests.toys import Chain, Residual, TwoBranches, kept

MODELS = {
    "chain": (Chain, (3, 8, 8)),
    "residual": (Residual, (3, 8, 8)),
    "two branches": (TwoBranches, (3, 8, 8)),
}


@kept
def cut(name: str, **options: object) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    net = sffx.transform(kind(), "layer", torch.zeros(1, *shape), **options)
    return net.train(), torch.randn(5, *shape)


class WithSideValues(torch.nn.Module):
    """Three layers; the first block gives a mask to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.second = torch.nn.Linear(8, 8)
        self.third = torch.nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        positive = y > 0
        y = torch.relu(self.second(y))
        return self.third(y.masked_fill(~positive, 0))


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_the_scores_of_a_walk_are_those_of_the_model_to_the_bit(name: str, norm: str) -> None:
    net, x = cut(name, norm=norm)
    torch.manual_seed(1)  # of dropout
    expected = copy.deepcopy(net)(x)
    torch.manual_seed(1)
    scores = [own for _, own in walk(net, x)]
    assert torch.equal(torch.stack(scores), expected)


def test_stages_say_what_they_read_and_give() -> None:
    model = WithSideValues()
    net = sffx.transform(model, "layer", torch.zeros(1, 6))
    first, second, classifier = stages_of(net)
    assert [stage.name for stage in (first, second, classifier)] == [
        "block_0",
        "block_1",
        "classifier",
    ]
    assert first.reads == (Value("x", (None, 6), "float32"),)
    output, side = first.gives
    assert (output.name, output.shape, output.dtype) == ("relu", (None, 8), "float32")
    assert (side.shape, side.dtype) == ((None, 8), "bool")
    assert second.reads == (output, side)
    assert classifier.reads == second.gives
    assert classifier.gives == ()


def test_a_stage_has_the_modules_that_learn_together() -> None:
    net, _ = cut("chain")
    first, *_, classifier = stages_of(net)
    assert first.modules == [net.block_0, net.head_0]
    assert first.norms == [net.norm_0]
    assert classifier.modules == [net.classifier]
    assert (classifier.head, classifier.norms) == (None, [])
    net.head_0.requires_grad_(False)
    assert set(first.trainable) == set(net.block_0.parameters())


def test_a_replaced_head_is_the_one_that_runs() -> None:
    net, x = cut("chain")
    stages = stages_of(net)
    net.head_0 = copy.deepcopy(net.head_0)
    torch.nn.init.zeros_(net.head_0.weight)
    torch.nn.init.zeros_(net.head_0.bias)
    assert stages_of(net) is stages
    _, scores = next(walk(net, x))
    assert not scores.any()


def test_stages_are_made_once_and_copies_have_their_own() -> None:
    net, x = cut("chain")
    stages = stages_of(net)
    assert stages_of(net) is stages
    twin = copy.deepcopy(net)
    assert stages_of(twin)[0].block is twin.block_0
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert stages_of(loaded)[0].block is loaded.block_0
    expected = torch.stack([own for _, own in walk(net, x)])
    for other in (twin, loaded):
        assert torch.equal(torch.stack([own for _, own in walk(other, x)]), expected)


def test_an_edited_graph_has_new_stages() -> None:
    net, x = cut("chain", norm="none")
    before = [own for _, own in walk(net, x)]
    detached = next(node for node in net.graph.nodes if node.name == "detached_0")
    with net.graph.inserting_after(detached):
        doubled = net.graph.call_function(torch.add, (detached, detached), {"alpha": 1.0})
    detached.replace_all_uses_with(doubled, lambda user: user is not doubled)
    net.recompile()
    after = [own for _, own in walk(net, x)]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_values_go_when_no_later_node_reads_them() -> None:
    net, x = cut("chain")
    values = input_values(net, bind(net.plan, x))
    held = []
    for _, _ in walk_attached(stages_of(net), values):
        held.append([node.name for node in values])
    # The input goes once block_0 has run; a block's output waits for its detach.
    assert held == [["block_0"], ["block_1"], []]


def test_gradients_stop_between_stages_of_a_walk() -> None:
    net, x = cut("residual")
    for stage, scores in walk(net, x):
        net.zero_grad()
        scores.sum().backward()
        reached = {p for p in net.parameters() if p.grad is not None}
        assert reached == set(stage.trainable)


def test_a_stage_prints_what_it_reads_and_gives() -> None:
    net, _ = cut("chain")
    assert repr(stages_of(net)[0]).startswith("Stage(block_0: reads ")
    assert repr(stages_of(net)[-1]).endswith("gives logits)")
