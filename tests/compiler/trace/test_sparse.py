"""Sparse tensors, as the edges of a graph, have no storage and no equality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx


class Diffusion(nn.Module):
    """Layers on the nodes of a graph, each with a product with the adjacency matrix behind it."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        edges = (torch.rand(5, 5) < 0.5).float()
        self.register_buffer("edges", edges.to_sparse() if layout == "buffer" else edges)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        edges = {
            "buffer": lambda: self.edges,
            "made": lambda: self.edges.to_sparse(),
            "made by rows": lambda: self.edges.to_sparse_csr(),
        }[self.layout]()
        for layer in self.layers:
            nodes = layer(x).transpose(0, 1)
            x = torch.sparse.mm(edges, nodes.flatten(1)).view_as(nodes).transpose(0, 1).relu()
        return self.head(x.mean(1))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["buffer", "made", "made by rows"])
def test_products_with_sparse_matrices_are_cut(layout):
    torch.manual_seed(0)
    model, x = Diffusion(layout), torch.randn(3, 5, 6)
    net = sffx.transform(model, "layer", x, check=True)
    assert len(net.plan) == 3
    assert net.plan.leaves == ()
    sffx.local_loss(net.train(), x, torch.arange(3)).backward()
    assert all(p.grad is not None for p in net.parameters())
    torch.testing.assert_close(sffx.extract(net)(x), model(x))
