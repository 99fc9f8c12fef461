"""Weights that an integer input picks for each sample, as of one head for each task:

    weight = self.heads[task]  # (B, J, C)
    return torch.bmm(weight, features[..., None])[..., 0]

They depend on an input and on a parameter, as a path does. But at the end of a model whose features
come from another input, they are the weights of the classifier, and no stream of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
from torch.fx import Node

from sffx.compiler.facts import facts
from sffx.compiler.layers import Layers
from sffx.tensors import can_learn, tensors_in


def picked_weights(graph: nx.DiGraph, nodes: Mapping[str, Node], layers: Layers) -> set[str]:
    """Return the nodes that compute the weights of a classifier from integers alone.

    1. They read parameters and integer inputs, and nothing that reads an input of floats.
    2. A parameter is read where it is picked. What reads a picked value has none of its own: with
       further layers, as of words, it is a stream.
    3. Nothing behind the place where the weights are used has a parameter.

    Args:
        graph: of all nodes, with the attribute `path`.
        nodes: by name.
        layers: of the model.
    """

    def reads_parameter(name: str) -> bool:
        return _reads_parameter(name, graph, nodes, layers)

    paths = [name for name, is_path in graph.nodes(data="path") if is_path]
    of_floats = _after_floats(graph, nodes)
    of_integers = [name for name in paths if name not in of_floats]
    if len(of_integers) == len(paths):
        return set()
    picked: set[str] = set()
    alone = graph.subgraph(of_integers)
    for part in nx.weakly_connected_components(alone):
        starts = [name for name in part if not alone.in_degree(name)]
        if not any(map(reads_parameter, part.difference(starts))):
            picked |= part
    behind: set[str] = set()
    for name in picked:
        behind |= nx.descendants(graph, name)
    behind -= picked
    is_end = not any(map(reads_parameter, behind))
    return picked if is_end and behind & of_floats else set()


def _after_floats(graph: nx.DiGraph, nodes: Mapping[str, Node]) -> set[str]:
    """Return the nodes to which an input of floats leads, through tensors that can learn."""
    found: set[str] = set()
    for name, node in nodes.items():
        learns = any(can_learn(tensor) for tensor in tensors_in(facts(node).example))
        if learns and (node.op == "placeholder" or not found.isdisjoint(graph.predecessors(name))):
            found.add(name)
    return found


def _reads_parameter(
    name: str, graph: nx.DiGraph, nodes: Mapping[str, Node], layers: Layers
) -> bool:
    """Return whether a node has a parameter, as a layer, or reads one by its name."""
    read = [nodes[source] for source in graph.predecessors(name)]
    named = [node for node in read if node.op == "get_attr"]
    return any(layers.parameters(node) for node in (nodes[name], *named))
