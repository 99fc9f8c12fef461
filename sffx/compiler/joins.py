"""Where several paths meet in a node, and how: by a sum, a concatenation or a product."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sffx.compiler.dataflow import SOURCE, Dataflow
from sffx.compiler.layers import Layers

# Targets of nodes, by how they join paths. A string is the name of a method.
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub, "sub")
_CATS = (torch.cat, torch.concat, torch.concatenate)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
_JOINS: dict[Any, str] = {
    **dict.fromkeys(_SUMS, "sum"),
    **dict.fromkeys(_CATS, "cat"),
    **dict.fromkeys(_PRODUCTS, "product"),
}


class Joins:
    """Questions about the nodes in which several paths meet.

    Args:
        flow: the dataflow of the model.
        layers: of the model.
    """

    def __init__(self, flow: Dataflow, layers: Layers) -> None:
        self._flow = flow
        self._layers = layers

    def kind(self, name: str) -> str:
        """Return how several paths that left one node meet in another.

        It is "sum", "cat", "product" or "other"; "" where none meet. Paths that start at several
        inputs never parted, so they are no join. Paths that part at one input are.
        """
        flow = self._flow
        if not flow.is_path(name) or flow.paths.in_degree(name) < 2:
            return ""
        # No node on a path lies before all of them. So they start at inputs.
        start_at_inputs = flow.dominator[name] == SOURCE
        if start_at_inputs and not flow.share_an_input(name):
            return ""
        return _JOINS.get(flow.nodes[name].target, "other")

    def kind_in_step(self, name: str) -> str:
        """Return how the paths of a step meet; a product with a layer on each path is no gate."""
        kind = self.kind(name)
        if kind == "product" and min(self.layers_on_paths(name), default=0) > 0:
            return "other"
        return kind

    def layers_on_paths(self, name: str) -> tuple[int, ...]:
        """Return, for each path that meets in a join, its layers with parameters since they parted.

        At the sum of a residual block with two convolutions these are (2, 0). The paths are in the
        order of the arguments. Behind them are those that are in no argument: an in-place write
        asks for their order.
        """
        paths = self._flow.paths
        arguments = [arg.name for arg in self._flow.nodes[name].all_input_nodes]
        arguments_on_paths = [arg for arg in arguments if paths.has_edge(arg, name)]
        ends = dict.fromkeys([*arguments_on_paths, *paths.predecessors(name)])
        start = self._flow.dominator[name]
        counts = []
        for end in ends:
            passed = self._flow.between(start, end)
            layers = [each for each in passed if self._is_layer(self._flow.nodes[each])]
            counts.append(len(layers))
        return tuple(counts)

    def _is_layer(self, node: Node) -> bool:
        return bool(self._layers.parameters(node)) or self._layers.is_weighted(node)
