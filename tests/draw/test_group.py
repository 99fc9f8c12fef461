"""Blocks of many parts: the layers of one module are one part."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx.blocks import Block, Node
from sffx.draw import group
from sffx.draw.detail import functional_modules, module_names, parts
from sffx.draw.group import grouped


class Dense(nn.Module):
    """Layers that each read all that came before, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(5):
            layer = nn.Sequential(nn.BatchNorm2d(4 * (i + 1)), nn.Conv2d(4 * (i + 1), 4, 1))
            self.layers.append(layer)
        self.norm = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return self.fc(self.norm(torch.cat(values, 1)).mean((2, 3)))


@cache
def dense_block() -> Block:
    return sffx.plan(Dense(), ["norm"], torch.zeros(1, 4, 4, 4)).blocks[0]


def test_the_layers_of_a_module_and_the_join_before_them_are_one_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = dense_block()
    whole = parts(block, "modules")
    texts = [part.text for part in whole]
    assert texts[:4] == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]
    assert texts.count("cat") == 4
    monkeypatch.setattr(group, "MOST", 8)
    few = parts(block, "modules")
    # The cat before the norm belongs to it. That of the input alone is no path and is left out.
    assert [part.text for part in few] == [*(f"layers.{i} (2)" for i in range(5)), "norm"]
    assert [len(part.node.reads) for part in few] == [0, 2, 3, 4, 5, 6]
    assert few[-1].node.name == block.output
    # All nodes stay as they are.
    assert len(parts(block, "nodes")) > len(whole)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_block_stays_a_graph_in_order_with_its_output(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    nodes: list[Node] = []
    for i in range(count):
        before = [node.name for node in nodes] + ["x"]
        reads = data.draw(st.lists(st.sampled_from(before), max_size=3, unique=True))
        is_module = data.draw(st.booleans())
        path = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3))
        call = ".".join(["net", *path]) if is_module else "cat"
        nodes.append(Node(f"n{i}", call, is_module, tuple(reads)))
    sides = data.draw(st.lists(st.sampled_from([node.name for node in nodes]), max_size=2))
    block = replace(
        dense_block(), name="net", output=nodes[-1].name, sides=tuple(sides), graph=tuple(nodes)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "MOST", data.draw(st.integers(1, 8)))
        found = grouped(block, nodes)
    known = {"x"}
    for node in found:
        assert set(node.reads) <= known
        assert node.name not in known
        known.add(node.name)
    assert {block.output, *sides} <= known
    # What a value depends on, it depends on still.
    assert _reached(found, block.output) >= _reached(nodes, block.output)


def _reached(nodes: list[Node] | tuple[Node, ...], name: str) -> set[str]:
    """Return the values from outside that a value depends on."""
    by_name = {node.name: node for node in nodes}
    outer: set[str] = set()
    waiting = [name]
    seen: set[str] = set()
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        if each in by_name:
            waiting += by_name[each].reads
        else:
            outer.add(each)
    return outer


class Attention(nn.Module):
    """Computes by functions on the weights of its layers, as Swin's window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 8)
        self.proj = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.qkv.weight, self.qkv.bias) + self.bias
        return nn.functional.linear(y.relu(), self.proj.weight, self.proj.bias)


class Scaled(nn.Module):
    """A block with an attention, and a weight of its own that is no module's name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = Attention()
        self.mlp = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attn(self.norm(x))) * self.gamma


def test_a_module_that_computes_by_functions_is_named_where_it_ends() -> None:
    model = nn.Sequential(Scaled(), Scaled(), nn.Linear(8, 3))
    block = sffx.plan(model, "residual", torch.zeros(1, 8)).blocks[1]
    assert module_names(block) == ["1.norm", "1.attn", "1.mlp"]
    assert list(functional_modules(block).values()) == ["1.attn"]
    assert [part.text for part in parts(block, "modules")] == ["norm", "attn", "mlp", "+"]


def test_modules_that_are_called_are_named_as_they_are() -> None:
    block = dense_block()
    assert functional_modules(block) == {}
    assert module_names(block) == list(block.modules)
