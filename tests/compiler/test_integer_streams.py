"""Integers that cross a cut, as the neighbours of points, keep no blocks together.

The oracle is the model itself: the net without norms computes what it computes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx


def neighbours(x: Tensor) -> Tensor:
    """Return the four nearest neighbours of each point of (B, C, N), (B, N, 4)."""
    return torch.cdist(x.mT, x.mT).topk(4, dim=-1, largest=False).indices


def edges(x: Tensor, index: Tensor) -> Tensor:
    """Return the features of each edge, (B, 2 * C, N, 4)."""
    _, channels, number = x.shape
    wide = x[:, :, None].expand(-1, -1, number, -1)
    near = wide.gather(3, index[:, None].expand(-1, channels, -1, -1))
    own = x[..., None].expand_as(near)
    return torch.cat([near - own, own], 1)


class Points(nn.Module):
    """Three layers on the edges of a graph of points."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2 * width, 8, 1) for width in (3, 8, 8))
        self.head = nn.Linear(8, 4)

    def layer(self, i: int, x: Tensor, index: Tensor) -> Tensor:
        return self.layers[i](edges(x, index)).relu().amax(-1)


class Dynamic(Points):
    """Each layer has a graph of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = self.layer(i, x, neighbours(x))
        return self.head(x.amax(-1))


class Kept(Points):
    """The graph of the first layer's features is that of the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(0, x, neighbours(x))
        index = neighbours(x)
        x = self.layer(2, self.layer(1, x, index), index)
        return self.head(x.amax(-1))


class Pooled(Points):
    """Layers on some of the points, whose features are then put back among zeros."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(width, 8, 1) for width in (3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x).relu()
        index = first.norm(dim=1, keepdim=True).topk(5, dim=-1).indices.expand(-1, 8, -1)
        x = first.gather(2, index)
        for layer in self.layers[1:]:
            x = layer(x).relu()
        return self.head(self.put(first, index, x).mean(-1))

    @staticmethod
    def put(like: Tensor, index: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(like).scatter(2, index, x)


class PooledInPlace(Pooled):
    @staticmethod
    def put(like: Tensor, index: Tensor, x: Tensor) -> Tensor:
        zeros = like.new_zeros(like.shape)
        zeros.scatter_(2, index, x)
        return zeros


X = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("policy", ["residual", "layer"])
@pytest.mark.parametrize("kind", [Dynamic, Kept, Pooled, PooledInPlace])
def test_each_layer_is_a_block(kind, policy):
    torch.manual_seed(0)
    model = kind()
    net = sffx.transform(model, policy, X, norm="none", check=False)
    assert [block.modules for block in net.plan] == [(f"layers.{i}",) for i in range(3)]
    assert torch.equal(net(X)[-1], model(X))
