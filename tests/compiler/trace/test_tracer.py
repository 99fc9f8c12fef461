from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.compiler.trace.trace import trace
from tests.compiler.trace.oracle import (
    Applies,
    assert_same_logits,
    cut_without_norms,
    leaf_names,
)
from tests.toys import DataBranch, around


def _without_gradient(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.inner(x)


def _in_bfloat16(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.inner(x).float()


@pytest.mark.parametrize("code", [_without_gradient, _in_bfloat16])
def test_a_region_that_a_graph_cannot_hold_makes_a_leaf(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model)


def test_a_module_that_a_forward_makes_is_part_of_its_code():
    model = around(Applies(lambda m, x: nn.ReLU()(x)))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)


@dataclass
class _Record:
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: object = None


class _Decorated(nn.Module):
    """A forward behind a decorator, with arguments that only `**kwargs` takes.

    It returns a record with a thing that no graph can hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(
        self, x: Tensor, scale: float = 1.0, *, bias: Tensor | None = None, **kwargs: Tensor
    ) -> _Record:
        x = F.relu(self.inner(x)) * scale + (0 if bias is None else bias) + kwargs.get("shift", 0)
        return _Record(logits=self.head(x), cache=object())

    plain_forward = forward

    @functools.wraps(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> _Record:
        return self.plain_forward(*args, **kwargs)


def test_a_decorated_forward_takes_its_arguments_by_name_and_returns_a_record():
    model = _Decorated()
    inputs = {name: torch.randn(5, 6) for name in ("x", "bias", "shift")}
    net = cut_without_norms(model, example={**inputs, "scale": 2.0}).eval()
    assert [i.name for i in net.plan.inputs] == ["x", "bias", "shift"]
    assert torch.equal(net(**inputs), model(**inputs, scale=2.0).logits)


class _NoMask(nn.Module):
    """A leaf that returns a value and, as its second output, no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DataBranch()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self.inner.inner(x) if x.sum() > 0 else self.inner(x)), None


class _ReadsMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = _NoMask(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x)
        x = F.relu(x)
        return self.head(x if mask is None else x.masked_fill(mask, 0.0))


def test_none_among_the_outputs_of_a_leaf_is_none():
    traced = trace(_ReadsMask())
    assert [leaf.qualname for leaf in traced.leaves] == ["embed"]
    assert "masked_fill" not in {node.target for node in traced.graph.nodes}
