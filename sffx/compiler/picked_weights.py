"""Weights that an integer input picks for each sample, as of one head for each task:

    weight = self.heads[task]  # (B, J, C)
    return torch.bmm(weight, features[..., None])[..., 0]

Such weights depend on an input and on a parameter, as a path does. But they are no stream that a
block could learn from: they belong to the classifier, which applies them to the features of another
input.
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
    2. Only the nodes that pick read a parameter. If further layers read the picked values, as they
       do with the embeddings of words, the values are a stream.
    3. The weights are applied to features of floats, and no parameter is read from there on.

    Args:
        graph: of all nodes, with the attribute `path`.
        nodes: by name.
        layers: of the model.
    """

    def reads_parameter(name: str) -> bool:
        return _reads_parameter(name, graph, nodes, layers)

    paths = [name for name, is_path in graph.nodes(data="path") if is_path]
    of_floats = _after_floats(graph, nodes)
    of_integers = graph.subgraph(name for name in paths if name not in of_floats)
    if len(of_integers) == len(paths):
        return set()  # no path has features of floats
    picked: set[str] = set()
    for part in nx.weakly_connected_components(of_integers):
        # The first nodes of a part are those that pick: they alone may read a parameter.
        others = [name for name in part if of_integers.in_degree(name) > 0]
        if not any(map(reads_parameter, others)):
            picked |= part
    behind: set[str] = set()
    for name in picked:
        behind |= nx.descendants(graph, name)
    behind -= picked
    if behind.isdisjoint(of_floats) or any(map(reads_parameter, behind)):
        return set()
    return picked


def _after_floats(graph: nx.DiGraph, nodes: Mapping[str, Node]) -> set[str]:
    """Return the inputs of floats, and the nodes that they lead to through tensors of floats."""
    found: set[str] = set()
    for name, node in nodes.items():
        is_of_floats = any(can_learn(tensor) for tensor in tensors_in(facts(node).example))
        reads_found = not found.isdisjoint(graph.predecessors(name))
        if is_of_floats and (node.op == "placeholder" or reads_found):
            found.add(name)
    return found


def _reads_parameter(
    name: str, graph: nx.DiGraph, nodes: Mapping[str, Node], layers: Layers
) -> bool:
    """Return whether a node has a parameter, as a layer, or reads one by its name."""
    read = [nodes[source] for source in graph.predecessors(name)]
    named = [node for node in read if node.op == "get_attr"]
    return any(layers.parameters(node) for node in (nodes[name], *named))
