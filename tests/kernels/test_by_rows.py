"""A head part by part of the rows against the head on all of them: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sffx.kernels import batch_slices
from sffx.kernels.by_rows import by_rows
from sffx.learning.cosine import CosineGoodness
from sffx.memory.count import count_memory


def head_of(hidden: int | None = 7) -> CosineGoodness:
    torch.manual_seed(0)
    return CosineGoodness(5, 3, spatial=0, hidden=hidden).double()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    small=st.integers(1, 120),
    frozen=st.sets(st.sampled_from(["weight", "hidden.weight", "hidden.bias"]), max_size=2),
    wants_rows=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_head(rows, small, frozen, wants_rows):
    head = head_of()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x = torch.randn(rows, 5, dtype=torch.float64).requires_grad_(wants_rows)
    wanted = [p for p in head.parameters() if p.requires_grad] + ([x] if wants_rows else [])
    above = torch.randn(rows, 3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_slices, "_SMALL", small)
        found = by_rows(head, x, 7)
        gradients = torch.autograd.grad(found, wanted, above)
    expected = head(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, above))


def test_nothing_is_kept_but_the_rows(monkeypatch):
    monkeypatch.setattr(batch_slices, "_SMALL", 8 * 7)
    head, x = head_of(), torch.randn(400, 5, dtype=torch.float64, requires_grad=True)
    in_parts = count_memory(lambda: by_rows(head, x, 7).sum().backward(), model=head)
    at_once = count_memory(lambda: head(x).sum().backward(), model=head)
    # The scores and the gradients of both, and some parts.
    assert in_parts.activations < 400 * (5 + 3 + 3) * 8 + 10_000 < at_once.activations


def test_a_compiled_graph_holds_the_head_itself(monkeypatch):
    monkeypatch.setattr(batch_slices, "_SMALL", 8)
    head, x = head_of(), torch.randn(9, 5, dtype=torch.float64)
    program = torch.export.export(_Wrapped(head), (x,))
    torch.testing.assert_close(program.module()(x), head(x))


class _Wrapped(torch.nn.Module):
    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_rows(self.head, x, 7)
