"""Layers that keep a state from call to call, which another forward sets."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class _Neuron(nn.Module):
    """Keeps a potential in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.potential: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.potential is None else self.potential
        self.potential = 0.5 * before + x
        return self.potential


class _DrawnOnce(nn.Module):
    """Keeps a number that it draws, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.potential: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.potential is None:
            self.potential = torch.full_like(x, random.random())
        return x * self.potential


class _Twice(nn.Module):
    """Runs a layer on two steps in time, and sets its state before, if it is to."""

    def __init__(self, layer: nn.Module, is_reset: bool) -> None:
        super().__init__()
        self.a, self.layer, self.is_reset = nn.Linear(4, 6), layer, is_reset

    def forward(self, x: Tensor) -> Tensor:
        if self.is_reset:
            self.layer.potential = None
        return self.layer(self.a(x)) + self.layer(self.a(2 * x))


class _Net(nn.Module):
    def __init__(self, layer: nn.Module, resets_in_block: bool) -> None:
        super().__init__()
        self.block = _Twice(layer, resets_in_block)
        self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.block.is_reset:
            self.block.layer.potential = torch.zeros(())
            self.block.layer.potential = None
        return self.head(self.b(self.block(x)).relu())


@pytest.mark.parametrize("resets_in_block", [True, False])
def test_a_state_that_is_reset_outside_of_its_layer_is_kept_call_by_call(resets_in_block):
    model = _Net(_Neuron(), resets_in_block)
    net = sffx.transform(model, example_input=X, check=False)
    assert not net.plan.leaves
    assert sffx.check(model, net, X, raises=False).difference is None


def test_the_module_that_resets_the_state_is_a_leaf_if_it_cannot_be_traced():
    model = _Net(_DrawnOnce(), resets_in_block=True)
    net = sffx.transform(model, example_input=X, check=False)
    (leaf,) = net.plan.leaves
    assert leaf.qualname == "block"
    assert "'potential' of block.layer, a _DrawnOnce, is set while it does not run" in leaf.reason
    assert sffx.check(model, net, X, raises=False).difference is None


def test_a_model_is_refused_if_no_leaf_can_hold_a_state_and_its_resetting():
    with pytest.raises(TraceError, match=r"'layer.potential' of block, .* draws random"):
        sffx.transform(_Net(_DrawnOnce(), resets_in_block=False), example_input=X)


class _Buffered(nn.Module):
    """Keeps a state in a buffer, and is given the state to start from."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(4, 6))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        self.state = 0.5 * state.expand_as(x) + x
        return self.state


class _Resetting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.head = nn.Linear(4, 6), _Buffered(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.cell.state = torch.zeros_like(self.cell.state[:1])
        return self.head(self.cell(self.a(x), self.cell.state))


def test_a_buffer_that_was_assigned_is_read_as_it_was_assigned():
    model = _Resetting()
    net = sffx.transform(model, example_input=X, check=False)
    assert sffx.check(model, net, X, raises=False).difference is None
