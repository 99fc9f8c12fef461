"""Graph networks of torch_geometric, on small graphs of 12 nodes with the same edges.

A batch is one large graph, as `torch_geometric.data.Batch` makes it: the nodes of all graphs lie
behind one another on the first axis, and no edge connects two graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tools.zoo.entries import CLASSES, REQUESTS, Model, random_inputs

REQUIRES = ("torch_geometric", "xxhash", *REQUESTS)

NODES = 12
FEATURES = 8
_WIDTH = 24
_LAYERS = 4
_DEGREES = 4


def _edges() -> Tensor:
    """Return the edges of a ring with chords, shape (2, E), in both directions."""
    node = torch.arange(NODES)
    sources = torch.cat([node, node])
    targets = torch.cat([(node + 1) % NODES, (node + 5) % NODES])
    return torch.stack([torch.cat([sources, targets]), torch.cat([targets, sources])])


class Batched(nn.Module):
    """A network on the large graph of a batch. It returns the scores of each graph or each node.

    Args:
        network: takes the features of all nodes, (B * N, F), and the edges, (2, B * E). If it
            pools, it also takes the graph of each node, (B * N,), and the number of graphs.
        pools: whether the network itself returns a row for each graph.
        nodes: whether each node is classified, and not each graph.
    """

    edges: Tensor

    def __init__(self, network: nn.Module, *, pools: bool = False, nodes: bool = False) -> None:
        super().__init__()
        self.network = network
        self.pools = pools
        self.nodes = nodes
        self.head = nn.Identity() if pools else nn.Linear(_WIDTH, CLASSES)
        self.register_buffer("edges", _edges())

    def forward(self, x: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        graphs = x.shape[0]
        first_nodes = NODES * torch.arange(graphs, device=x.device)
        edges = (self.edges.unsqueeze(1) + first_nodes.unsqueeze(1)).flatten(1)
        graph_of_node = torch.arange(graphs, device=x.device).repeat_interleave(NODES)
        x = x.flatten(0, 1)
        if self.pools:
            return self.network(x, edges, graph_of_node, graphs)
        x = self.network(x, edges)
        if self.nodes:
            return self.head(x).unflatten(0, (graphs, NODES))
        return self.head(global_mean_pool(x, graph_of_node, graphs))


class Stack(nn.Module):
    """Layers with an activation behind each, as in the examples of the package."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        widths = [FEATURES] + _LAYERS * [_WIDTH]
        self.layers = nn.ModuleList(map(make, widths, widths[1:]))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges).relu()
        return x


class Residual(nn.Module):
    """An encoder of nodes, and layers that keep the width."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, _WIDTH)
        self.layers = nn.ModuleList(make() for _ in range(_LAYERS))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x, edges)
        return x


_INPUTS = random_inputs(x=(NODES, FEATURES))


def _model(name: str, *, nodes: bool = False, **options: Any) -> Model:
    """Return a model of `torch_geometric.nn.models` with the usual arguments."""

    def build() -> nn.Module:
        from torch_geometric.nn import models

        network = getattr(models, name)(FEATURES, _WIDTH, _LAYERS, _WIDTH, **options)
        return Batched(network, nodes=nodes)

    return Model(build, _INPUTS, "nodes" if nodes else "classification")


def _stack(name: str, **options: Any) -> Model:
    """Return a stack of layers of `torch_geometric.nn`."""

    def build() -> nn.Module:
        from torch_geometric import nn as layers

        kind = getattr(layers, name)
        return Batched(Stack(lambda width, following: kind(width, following, **options)))

    return Model(build, _INPUTS)


def _gps() -> nn.Module:
    """Return the blocks of GraphGPS: a GIN beside attention between all nodes of a graph."""
    from torch_geometric.nn import MLP, GINConv, GPSConv

    return Batched(Residual(lambda: GPSConv(_WIDTH, GINConv(MLP([_WIDTH, _WIDTH, _WIDTH])))))


def _deep_gcn() -> nn.Module:
    from torch_geometric.nn import DeepGCNLayer, GENConv

    def layer() -> nn.Module:
        return DeepGCNLayer(GENConv(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH), nn.ReLU())

    return Batched(Residual(layer))


def _graph_unet() -> nn.Module:
    from torch_geometric.nn import GraphUNet

    return Batched(GraphUNet(FEATURES, _WIDTH, _WIDTH, depth=2))


def _neural_fingerprint() -> nn.Module:
    from torch_geometric.nn.models import NeuralFingerprint

    return Batched(NeuralFingerprint(FEATURES, _WIDTH, CLASSES, _LAYERS), pools=True)


class Dense(nn.Module):
    """Layers on adjacency matrices, one for each sample."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        kind = getattr(layers, name)
        widths = [FEATURES] + _LAYERS * [_WIDTH]
        self.layers = nn.ModuleList(map(kind, widths, widths[1:]))
        self.norms = nn.ModuleList(nn.BatchNorm1d(_WIDTH) for _ in range(_LAYERS))
        self.head = nn.Linear(_WIDTH, CLASSES)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x, adj).transpose(1, 2)).transpose(1, 2).relu()
        return self.head(x.mean(1))


def _dense(name: str) -> Model:
    return Model(lambda: Dense(name), random_inputs(x=(NODES, FEATURES), adj=(NODES, NODES)))


MODELS = {
    "gcn": _model("GCN"),
    "gcn_nodes": _model("GCN", nodes=True),
    "gcn_jumping_knowledge": _model("GCN", norm="batch_norm", jk="cat"),
    "graph_sage": _model("GraphSAGE", norm="batch_norm"),
    "gin": _model("GIN"),
    "gin_batch_norm": _model("GIN", norm="batch_norm"),
    "gat": _model("GAT", heads=2, dropout=0.1),
    "gat_v2_nodes": _model("GAT", nodes=True, v2=True, heads=2, norm="layer_norm"),
    "pna": _model(
        "PNA",
        aggregators=["mean", "max", "std"],
        scalers=["identity", "amplification"],
        deg=torch.tensor([0] * _DEGREES + [NODES]),
    ),
    "edge_cnn": _model("EdgeCNN"),
    "transformer_conv": _stack("TransformerConv"),
    "cheb_conv": _stack("ChebConv", K=3),
    "tag_conv": _stack("TAGConv"),
    "graph_conv": _stack("GraphConv", aggr="max"),
    "gps": Model(_gps, _INPUTS),
    "deep_gcn": Model(_deep_gcn, _INPUTS),
    "graph_unet": Model(_graph_unet, _INPUTS),
    "neural_fingerprint": Model(_neural_fingerprint, _INPUTS),
    "dense_gcn": _dense("DenseGCNConv"),
    "dense_sage": _dense("DenseSAGEConv"),
}
