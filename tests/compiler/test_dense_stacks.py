"""Short stacks whose layers each go to the end are cut after each layer; blocks are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx


class Stack(nn.Module):
    """Layers in a row; a function makes one value of what they return."""

    def __init__(self, number, merge, width=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 if i == 0 else 8, 8) for i in range(number))
        self.head = nn.Linear(width, 4)
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            x = layer(x).relu()
            outputs.append(x)
        return self.head(self.merge(outputs))


MERGES = {
    "concatenation": lambda values: torch.cat(values, 1),
    "maximum": lambda values: torch.stack(values).amax(0),
    "sum": sum,
}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
def test_each_layer_that_goes_to_the_end_is_a_block(merge, number):
    torch.manual_seed(0)
    model = Stack(number, MERGES[merge], 8 * number if merge == "concatenation" else 8)
    net = sffx.transform(model, example_input=X, norm="none", check=False)
    with_layers = [block.modules for block in net.plan if block.modules]
    assert with_layers == [(f"layers.{i}",) for i in range(number)]
    assert torch.equal(net(X)[-1], model(X))
    sffx.local_loss(net, X, torch.tensor([0, 1, 2])).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


class Joined(nn.Module):
    """Two layers behind a first one, which a function joins."""

    def __init__(self, join):
        super().__init__()
        self.first, self.a, self.b, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head(self.join(self, x))


WHOLE = {
    "residual block": lambda m, x: x + m.b(m.a(x).relu()),
    "parallel paths": lambda m, x: m.a(x).relu() + m.b(x).relu(),
    "gate": lambda m, x: m.a(x) * m.b(x).sigmoid(),
    "two layers before the sum": lambda m, x: x + m.b(m.a(x)),
}


@pytest.mark.parametrize("join", WHOLE)
def test_what_is_no_stack_stays_whole(join):
    plan = sffx.plan(Joined(WHOLE[join]), example_input=X)
    assert [block.modules for block in plan] == [("first",), ("a", "b")]
