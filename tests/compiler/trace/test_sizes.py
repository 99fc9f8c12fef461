"""What a forward decides by the sizes of its input is symbolic, or settled with a note."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.sizes import SETTLED_BY_SIZE
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms


def _padded(x: Tensor) -> Tensor:
    extra = -x.shape[-1] % 8
    return F.pad(x, (0, extra)) if extra else x


def _scaled(x: Tensor) -> Tensor:
    return x * float(x.shape[2])


def _at_most_eight(x: Tensor) -> Tensor:
    """Takes smaller images only, as positions do that are read up to the number of tokens."""
    positions = x.new_ones(8, 8)[: x.shape[2], : x.shape[3]]
    return x * 2 + positions if x.shape[2] > 4 else x + positions


def _of_a_fixed_size(x: Tensor) -> Tensor:
    assert x.shape[2] == 8
    return x * 2 if x.shape[1] == 3 and x.shape[3] == 8 else x


def _symbolic(x: Tensor) -> Tensor:
    return x * x.shape[2] + x.new_ones(x.shape[2:])


def _by_the_number_of_axes(x: Tensor) -> Tensor:
    return x[None] if x.ndim == 3 else x * x.shape[1]


class _Net(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.code = code
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.code(x)
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("code", [_padded, _scaled, _at_most_eight])
def test_a_decision_that_another_size_changes_is_noted(code):
    plan = sffx.plan(_Net(code), "layer", torch.randn(1, 3, 8, 8))
    assert SETTLED_BY_SIZE in plan.notes


@pytest.mark.parametrize("code", [_of_a_fixed_size, _symbolic, _by_the_number_of_axes])
def test_a_decision_that_no_size_changes_is_not_noted(code):
    model = _Net(code).eval()
    net = cut_without_norms(model, example=torch.randn(1, 3, 8, 8))
    assert SETTLED_BY_SIZE not in net.plan.notes
    assert_same_logits(net, model, torch.randn(2, 3, 8, 8))
