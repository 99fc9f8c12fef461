"""Modules that are traced through, though they look as if no graph could hold them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from tests.compiler.trace.oracle import Applies, assert_same_logits, cut_without_norms, leaf_names
from tests.toys import around


class _Dropped(nn.Module):
    """Stochastic depth by Python's random, with a rate of keeping."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.inner, self.keep = nn.Linear(6, 6), keep

    def forward(self, x: Tensor) -> Tensor:
        if self.keep > random.random() or not self.training:
            x = x + self.inner(x)
        return x


@pytest.mark.parametrize(
    ("keep", "leaves"),
    [(1, []), (1.0, []), (np.float64(1), []), (0.5, ["2"]), (np.float32(0.5), ["2"])],
)
def test_a_layer_that_is_never_dropped_is_traced(keep, leaves):
    state = random.getstate()
    net = cut_without_norms(around(_Dropped(keep)))
    assert leaf_names(net) == leaves
    assert random.getstate() == state


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        rate = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate)[:, 0] + torch.ones(6)


class _Around(nn.Module):
    """Branches on its mode without effect, around a module that branches with one."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.inner = 0.0, _Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and self.rate > 0 else x + self.inner(x)


def test_a_rate_belongs_to_the_innermost_module_that_reads_its_mode():
    model = around(_Around()).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)
    # One weight is dropped or not for each sample, so few samples are often alike in two calls.
    x = torch.randn(128, 6)
    assert not torch.equal(net.train()(x)[-1], net(x)[-1])


class _Sum(nn.Module):
    def forward(self, x: Tensor, residual: Tensor, past: Any = ()) -> Tensor:
        return x + residual


class _SumOfAll(nn.Module):
    def forward(self, *values: Tensor) -> Tensor:
        return sum(values) if self.training else sum(values) * 1.0


class _Stack(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))
        self.joins = nn.ModuleList(kind() for _ in range(3))
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, past = self.stem(x), []
        for layer, join in zip(self.layers, self.joins, strict=True):
            past.append(x)
            more = {"past": past} if isinstance(join, _Sum) else {}
            x = join(layer(x), x, **more)
        return self.head(x)


def test_a_sum_in_a_module_without_children_is_a_join():
    model = _Stack(_Sum).eval()
    net = sffx.transform(model, norm="none")
    net.readout.mode = "classifier"
    assert len(net.plan) >= 3
    assert_same_logits(net, model)


def test_a_sum_of_any_number_of_values_that_reads_its_mode():
    model = _Stack(_SumOfAll).eval()
    net = cut_without_norms(model)
    for training in (False, True):
        assert_same_logits(net.train(training), model.train(training))


class _Checked(nn.Module):
    """A leaf by a branch on values, which ends in a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            x = x.nan_to_num()
        return self.linear(x)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_the_channel_axis_of_a_leaf_is_that_of_its_last_layer():
    layers = [_Checked(3), nn.ReLU(), _Checked(8), nn.ReLU(), _Checked(8), nn.ReLU()]
    model = nn.Sequential(*layers, _Mean(), nn.Linear(8, 4))
    plan = sffx.plan(model, "layer", torch.randn(2, 6, 3))
    assert len(plan) == 3
    assert {block.channel_axis for block in plan.blocks} == {2}


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: F.layer_norm(x, x.shape[1:]),
        lambda m, x: F.layer_norm(x, x.shape[-1:]),
        lambda m, x: F.rms_norm(x, x.size()[1:]),
        lambda m, x: np.float64(2) * x + x * np.int64(3),
        lambda m, x: x * 2 if x.ndim in {2, 3} else x,
        lambda m, x: {6: torch.tanh, 8: torch.relu}[x.shape[1]](x),
    ],
)
def test_sizes_that_are_handed_on_or_looked_up_and_numbers_of_numpy(code):
    model = around(Applies(code)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)
