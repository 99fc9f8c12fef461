from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.compiler.facts import facts
from sffx.compiler.trace.trace import Trace, trace


def _run(traced: Trace, x: Tensor) -> Tensor:
    return fx.GraphModule(traced.root, traced.graph).eval()(x)


class _AddsInPlace(nn.Module):
    """Keeps a second name of a value that it writes to by `+=`.

    fx by itself would trace a new value.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.first, self.head, self.form = nn.Linear(6, 6), nn.Linear(6, 4), form

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.form == "name":
            kept = h
        elif self.form == "view":
            kept = h[:, :3]
        else:
            kept = F.dropout(h, 0.5, self.training)
        count = x.shape[0]
        count *= 2  # a number, which has no in-place form
        kept += count
        return self.head(h + kept if self.form != "view" else h)


@pytest.mark.parametrize("form", ["name", "view", "dropout"])
def test_an_addition_in_place_reaches_the_other_names_of_the_value(form):
    model = _AddsInPlace(form).eval()
    traced = trace(model, torch.zeros(1, 6))
    x = torch.randn(3, 6)
    assert torch.equal(_run(traced, x), model(x))


class _ReadsBehind(nn.Module):
    """Writes through a view, and reads what it wrote by the name of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[:, :3].mul_(2)
        return self.head(h)


def test_a_hidden_read_comes_after_the_write():
    model = _ReadsBehind().eval()
    traced = trace(model, torch.zeros(1, 6))
    nodes = {node.name: node for node in traced.graph.nodes}
    write, read = nodes["mul_"], nodes["head"]
    assert [node.name for node in facts(write).writes] == ["getitem"]
    assert facts(read).after == (write,)
    assert [name for name, node in nodes.items() if facts(node).read_behind] == ["mul_"]
    x = torch.randn(3, 6)
    assert torch.equal(_run(traced, x), model(x))
