"""The dataflow of a traced model: its paths, its spine of dominators, and the steps between them.

A node is on a *path* if a block can learn from its value: float or complex tensors that depend,
through tensor edges, on an input and on a parameter. Sizes, masks, positions and values computed
from parameters alone are no paths. They cross a cut as side values.

One node *dominates* another if every path from the inputs to the other passes through it. The
*spine* is the row of nodes that dominate the logits. A *step* is everything that is computed
between one node of the spine and the next, so step i ends in `spine[i]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import networkx as nx
from torch import Tensor
from torch.fx import Node

from sffx.compiler.facts import facts
from sffx.compiler.layers import Layers
from sffx.compiler.trace.trace import Trace
from sffx.errors import CutError
from sffx.tensors import can_learn, holds_tensor, storage_key, tensors_in

SOURCE = "«inputs»"  # the virtual node that all paths start from; no fx node can be called so


class Dataflow:
    """The dataflow graph of a traced model.

    Attributes:
        nodes: the traced nodes by name, in the order they run, without the output.
        logits: name of the node that computes the logits.
        graph: of all nodes. An edge is an argument, or an order that an in-place write asks for.
            Each node has the attribute `path`.
        paths: the graph of the paths alone, which start in `SOURCE`.
        dominator: for each node on a path, the last node that dominates it.
        spine: names of the nodes that dominate the logits, in order; the last one is the logits.
        step_of: for each node, the index of its step.

    Raises:
        CutError: the logits are on no path.
    """

    def __init__(self, trace: Trace, layers: Layers) -> None:
        *nodes, output = trace.graph.nodes
        self.nodes: dict[str, Node] = {node.name: node for node in nodes}
        self.logits: str = output.args[0].name
        self.graph = _graph(self.nodes, layers)
        self.paths = _paths(self.graph)
        if self.logits not in self.paths:
            raise CutError(
                "the model's output does not depend on a parameter and an input, "
                "so there is nothing to train"
            )
        self.dominator: dict[str, str] = nx.immediate_dominators(self.paths, SOURCE)
        self.spine = self._spine()
        self.step_of = self._steps_of_nodes()

    def is_path(self, name: str) -> bool:
        """Return whether a node is on a path."""
        return bool(self.graph.nodes[name]["path"])

    def is_on_spine(self, name: str) -> bool:
        """Return whether a node dominates the logits."""
        return self.spine[self.step_of[name]] == name

    def between(self, start: str, end: str) -> set[str]:
        """Return the nodes on paths from `start` to `end`, without `start`."""
        passed = {start}
        ahead = [end]
        while ahead:
            name = ahead.pop()
            if name not in passed:
                passed.add(name)
                ahead += self.paths.predecessors(name)
        return passed - {start}

    def share_an_input(self, name: str) -> bool:
        """Return whether two of the paths that meet in a node start at the same input."""
        met: set[str] = set()
        for end in self.paths.predecessors(name):
            inputs = self._inputs_of_path(end)
            if inputs & met:
                return True
            met |= inputs
        return False

    def _inputs_of_path(self, end: str) -> set[str]:
        """Return the names of the inputs that the paths to a node start at."""
        inputs = set()
        for start in self.between(SOURCE, end):
            if self.paths.has_edge(SOURCE, start):
                for source in nx.ancestors(self.graph, start):
                    if self.nodes[source].op == "placeholder":
                        inputs.add(source)
        return inputs

    def _spine(self) -> list[str]:
        spine = [self.logits]
        # The last node that dominates a node is dominated by all others that do.
        while self.dominator[spine[-1]] not in (SOURCE, None):
            spine.append(self.dominator[spine[-1]])
        return spine[::-1]

    def _steps_of_nodes(self) -> dict[str, int]:
        """Return the index of the step of each node.

        1. A node gets the first step that uses its value.
        2. Exception: a node that is no path, but reads one, goes with the value that it reads.
        3. A node is computed no later than the nodes that use its value, wherever they went.
        4. Exception: what only a last write in place uses, as the update of a buffer, goes with
           what it reads, and the write comes after all earlier reads of what it writes.
        """
        step_of = {name: i for i, name in enumerate(self.spine)}
        # A node comes before its users, so the steps of its users are known on the way back.
        for name in reversed(self.nodes):
            uses = _steps(self.graph.successors(name), step_of)
            if uses and name not in step_of:
                step_of[name] = min(uses)
        self._place_last_writes(step_of)
        beside = [name for name in self.nodes if not self.is_path(name)]
        for name in beside:
            step_of[name] = self._step_beside(name, step_of)
        for name in reversed(beside):
            uses = _steps(self.graph.successors(name), step_of)
            step_of[name] = min([step_of[name], *uses])
        return step_of

    def _place_last_writes(self, step_of: dict[str, int]) -> None:
        """Give the paths that lead to no logits, but to a write in place, their steps."""
        readers: dict[int, list[str]] = {}  # the nodes that read a storage, so far
        for name, node in self.nodes.items():
            if self.is_path(name) and name not in step_of:
                before = [source for source in self.graph.predecessors(name) if source in step_of]
                for written in facts(node).writes:
                    before += readers.get(storage_key(facts(written).example), [])
                step_of[name] = max((step_of.get(each, 0) for each in before), default=0)
            for arg in node.all_input_nodes:
                value = facts(arg).example
                if isinstance(value, Tensor):
                    readers.setdefault(storage_key(value), []).append(name)

    def _step_beside(self, name: str, step_of: dict[str, int]) -> int:
        """Return the step of a node that is no path.

        A tensor stays in the step of the path that it reads, since behind a cut the value is
        normalised. A size may be read in the step after as well, where the value is at hand.

        Args:
            name: of the node.
            step_of: the steps of the nodes that it reads; its own, unless nothing uses its value.
        """
        sources = list(self.graph.predecessors(name))
        paths = [step_of[source] for source in sources if self.is_path(source)]
        if paths and holds_tensor(facts(self.nodes[name]).example):
            return max(paths)
        last = len(self.spine) - 1
        earliest = max(_steps(sources, step_of), default=0)
        if name not in step_of:  # nothing uses its value, or a guard alone: where it is at hand
            return min(max([earliest, *paths]), last)
        if paths:
            earliest = max(earliest, max(paths) + 1)
        return min(step_of[name], earliest, last) if paths else step_of[name]


def _steps(names: Iterable[str], step_of: dict[str, int]) -> list[int]:
    """Return the steps of those of the nodes that have one so far."""
    return [step_of[name] for name in names if name in step_of]


def _graph(nodes: dict[str, Node], layers: Layers) -> nx.DiGraph:
    graph = nx.DiGraph()
    dependences: dict[str, Dependence] = {}
    for name, node in nodes.items():
        before = (*node.all_input_nodes, *facts(node).after)
        sources = [source.name for source in before]
        own = _dependence(node, layers, [dependences[source] for source in sources])
        dependences[name] = own
        learns = any(can_learn(tensor) for tensor in _values_of(node))
        graph.add_node(name, path=learns and own.on_input and own.on_parameter)
        for source in sources:
            graph.add_edge(source, name)
    return graph


def _values_of(node: Node) -> Iterator[Tensor]:
    """Yield the tensors that a node computes: its value, and what `y[0] = x` writes into."""
    yield from tensors_in(facts(node).example)
    if facts(node).example is None:
        for written in facts(node).writes:
            yield from tensors_in(facts(written).example)


class Dependence(NamedTuple):
    """Whether a value depends, through tensors, on an input and on a parameter."""

    on_input: bool = False
    on_parameter: bool = False


def _dependence(node: Node, layers: Layers, sources: list[Dependence]) -> Dependence:
    """Return the dependence of a node's value, from those of the values that it reads."""
    if not any(True for _ in _values_of(node)):
        return Dependence()
    if node.op == "placeholder":
        return Dependence(on_input=True)
    has_parameters = bool(layers.parameters(node))
    if _stops_gradient(node) and not has_parameters:
        return Dependence()
    on_input = any(source.on_input for source in sources)
    on_parameter = any(source.on_parameter for source in sources)
    return Dependence(on_input, on_parameter or has_parameters)


def _stops_gradient(node: Node) -> bool:
    """Return whether a module's value has no gradient though its input has.

    Rotary positions are such a module: it looks at its input's dtype alone.
    """
    if node.op != "call_module":
        return False
    reads_gradient = any(_has_gradient(source) for source in node.all_input_nodes)
    return reads_gradient and not _has_gradient(node)


def _has_gradient(node: Node) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(facts(node).example))


def _paths(graph: nx.DiGraph) -> nx.DiGraph:
    """Return the graph of the nodes on paths, with `SOURCE` before those that start one."""
    paths = nx.DiGraph(graph.edges)
    paths.add_nodes_from(graph)
    for name, is_path in graph.nodes(data="path"):
        if not is_path:
            paths.remove_node(name)
    starts = [name for name, num_sources in paths.in_degree if num_sources == 0]
    for name in starts:
        paths.add_edge(SOURCE, name)
    return paths
