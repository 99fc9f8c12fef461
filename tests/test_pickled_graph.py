"""A pickled net computes, writes and draws as the net does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.pickled_graph import PickledGraph
from tests.compiler.trace.oracle import cut_without_norms


class _Stateful(nn.Module):
    """Writes on buffers and draws by code that reads no input."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.way = way
        self.register_buffer("steps", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.head(self.b(y + getattr(self, self.way)(y)).relu())

    def counted(self, y: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.steps.clone()

    def counted_by_a_view(self, y: Tensor) -> Tensor:
        self.steps.view(2, 4)[1].mul_(0.5).sub_(1)
        return self.steps * 2

    def averaged(self, y: Tensor) -> Tensor:
        self.steps.mul_(0.9)
        self.steps[:4] = y.detach().mean(0)[:4]
        return self.steps.clone()

    def filled(self, y: Tensor) -> Tensor:
        constant = torch.zeros(8)
        constant[2:] = 1.5
        return constant

    def drawn(self, y: Tensor) -> Tensor:
        return torch.rand(8)

    def pooled(self, y: Tensor) -> Tensor:
        return F.max_pool1d(y[:, None], 3, 1, 1)[:, 0] + F.adaptive_avg_pool1d(y[:, None], 8)[:, 0]


@pytest.mark.parametrize(
    "way", ["counted", "counted_by_a_view", "averaged", "filled", "drawn", "pooled"]
)
def test_a_pickled_net_computes_what_the_net_does(way):
    model = _Stateful(way)
    net = cut_without_norms(copy.deepcopy(model)).train()
    twins = [pickle.loads(pickle.dumps(net)), pickle.loads(pickle.dumps(copy.deepcopy(net)))]
    x = torch.randn(5, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(x)
        for each in (net, *twins):
            torch.manual_seed(seed)
            assert torch.allclose(each(x)[-1], expected, atol=1e-6)


def test_a_pickled_graph_has_the_same_nodes():
    class _Odd(nn.Module):
        def forward(self, x, input):
            y = torch.cat([x, input], dim=-1)[..., ::2].to(torch.float64)
            parts = y.split([2, 1], -1)
            y = torch.ops.aten.relu.default(torch.ops.aten.add(y, parts[0]))
            y = y.contiguous(memory_format=torch.contiguous_format)
            return F.max_pool1d(y, kernel_size=2).sum(dim=(0, 1)) + float("inf")

    traced = fx.symbolic_trace(_Odd())
    graph = PickledGraph(traced, traced.graph, class_name="Odd")
    # The protocol of torch.save.
    twin = pickle.loads(pickle.dumps(graph, protocol=2))
    assert twin.code == graph.code
    assert type(twin).__name__ == "Odd"
    assert [node.name for node in twin.graph.nodes] == [node.name for node in graph.graph.nodes]
