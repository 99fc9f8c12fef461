"""The dataflow of a traced model: its paths, its spine of dominators, and the steps between them.

A node is on a *path* if a block can learn from its value: float or complex tensors that depend,
through tensor edges, on an input and on a parameter. Sizes, masks, positions, zeros of the shape of
a value, and values computed from parameters alone are no paths. They cross a cut as side values.

One node *dominates* another if every path from the inputs to the other passes through it. A *cut
set* is a set of values such that every path to the logits passes through one of them. A node that
dominates the logits is a cut set of one. Where streams run side by side, a cut set has several
values. Its *main* value is the last that is computed with new parameters.

The *spine* is a row of cut sets in the order of computation: what is computed before one of them is
computed before the next as well. It has the nodes that dominate the logits, and the larger cut sets
that it is given. A *step* is everything that is computed between one cut set of the spine and the
next. An example is a residual block:

    x ── conv1 ── relu ── conv2 ── add ── fc
                    └───────────────┘

conv1, relu, add and fc dominate the logits, which fc computes. conv2 does not, since the shortcut
passes it by. So the spine is (conv1, relu, add, fc), and conv2 and add are one step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import networkx as nx
from torch import Tensor
from torch.fx import Node

from sffx.compiler.facts import carries_gradient, facts
from sffx.compiler.layers import Layers
from sffx.compiler.picked_weights import picked_weights
from sffx.compiler.qualnames import makes_values
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
            Each node has the attributes `path`, and `learned`: whether it reads a parameter.
        paths: the graph of the paths alone, which start in `SOURCE`.
        dominator: for each node on a path, the last node that dominates it.
        cut_sets: the cut set that ends each step, in the order of computation but for the main
            value, which comes last.
        spine: the main value of each cut set; the last one is the logits.
        step_of: for each node, the index of its step.

    Args:
        trace: of the model.
        layers: of the model.
        cut_sets: of several values, to be on the spine. Of any two, what is computed before one is
            computed before the other as well.

    Raises:
        CutError: the logits are on no path.
    """

    def __init__(
        self, trace: Trace, layers: Layers, cut_sets: Sequence[Iterable[str]] = ()
    ) -> None:
        *nodes, output = trace.graph.nodes
        self.nodes: dict[str, Node] = {node.name: node for node in nodes}
        self.logits: str = output.args[0].name
        self.graph = _graph(self.nodes, layers)
        self.paths = _paths(self.graph)
        if self.logits not in self.paths:
            raise CutError(
                "the model's output does not depend on a parameter and an input, "
                "so there is nothing to train. Hint: the output must be computed from both, "
                "without detach() or torch.no_grad() on the way"
            )
        self.dominator: dict[str, str] = nx.immediate_dominators(self.paths, SOURCE)
        self._order = {name: i for i, name in enumerate(self.nodes)}
        self._leading = nx.ancestors(self.paths, self.logits) | {self.logits}
        self._dominators = self._dominators_of_logits()
        self.cut_sets = self._spine(cut_sets)
        self.spine = [values[-1] for values in self.cut_sets]
        self.step_of = self._steps_of_nodes()

    def is_path(self, name: str) -> bool:
        """Return whether a node is on a path."""
        return bool(self.graph.nodes[name]["path"])

    def is_on_spine(self, name: str) -> bool:
        """Return whether a node is the main value of a cut set."""
        return self.spine[self.step_of[name]] == name

    def dominates(self, name: str) -> bool:
        """Return whether a node dominates the logits."""
        return name in self._dominators

    def leads_to_logits(self, name: str) -> bool:
        """Return whether a node is on a path that leads to the logits."""
        return name in self._leading

    def readers(self, name: str) -> set[str]:
        """Return the nodes that read a value on a path to the logits."""
        return self._leading.intersection(self.paths.successors(name))

    def before(self, names: Iterable[str]) -> set[str]:
        """Return some nodes on paths, and all nodes on paths that lead to them."""
        return _reached(names, self.paths.predecessors, {SOURCE})

    def parts(self, name: str) -> list[str]:
        """Return the nodes on paths to the logits that take one value out of a tuple of a node."""
        readers = self.in_order(self.readers(name))
        return [each for each in readers if self.tuple_of(each) == name]

    def tuple_of(self, name: str) -> str:
        """Return the node out of whose tuple a node takes one value; "" if it takes none."""
        node = self.nodes[name]
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, Node) or isinstance(facts(source).example, Tensor):
            return ""
        return source.name

    def inside(self, names: Iterable[str]) -> set[str]:
        """Return what lies before a cut across some nodes: all nodes on paths that lead to them.

        A tuple crosses no cut, unless it is one of these nodes. So the nodes that take values out
        of it lie before the cut as well, wherever the model takes them, as in
        `for film in self.generator(z).chunk(3, 1)`.
        """
        ends = set(names)
        found = self.before(ends)
        ahead = list(found)
        while ahead:
            name = ahead.pop()
            new = [] if name in ends else [part for part in self.parts(name) if part not in found]
            found.update(new)
            ahead += new
        return found

    def is_learned(self, name: str, inside: set[str]) -> bool:
        """Return whether a node, or a node that leads to it inside a set, reads a parameter."""
        ahead = [name]
        passed: set[str] = set()
        while ahead:
            node = ahead.pop()
            if node in passed or node not in inside:
                continue
            if self.graph.nodes[node]["learned"]:
                return True
            passed.add(node)
            ahead += self.paths.predecessors(node)
        return False

    def behind(self, name: str, inside: set[str]) -> set[str]:
        """Return the nodes of a set that the value of a node leads to, without the node."""

        def readers_inside(each: str) -> set[str]:
            return self.readers(each) & inside

        return _reached(readers_inside(name), readers_inside, set())

    def passes_by(self, name: str, starts: Iterable[str]) -> bool:
        """Return whether a path from one of the start nodes to the logits avoids a node."""
        return self.logits in _reached(starts, self.readers, {name})

    def crossing(self, inside: set[str]) -> list[str]:
        """Return the nodes of a set whose values lead from the set to the logits, in order."""
        leaving = []
        for name in inside & self._leading:
            if not self.readers(name) <= inside:
                leaving.append(name)
        return self.in_order(leaving)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Return names of nodes in the order in which the model computes them."""
        return sorted(names, key=self.position)

    def position(self, name: str) -> int:
        """Return the place of a node in the order in which the model computes them."""
        return self._order[name]

    def _computed_at(self, name: str) -> tuple[int, int]:
        """Return a key by which values are in order, those taken out of a tuple with the tuple."""
        source = name
        while self.tuple_of(source):
            source = self.tuple_of(source)
        return self.position(source), self.position(name)

    def between(self, start: str, end: str) -> set[str]:
        """Return the nodes on paths from `start` to `end`, without `start`."""
        return _reached([end], self.paths.predecessors, {start})

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
        before: set[str] = set()
        for start in self.between(SOURCE, end):
            if self.paths.has_edge(SOURCE, start):
                before |= nx.ancestors(self.graph, start)
        # An input is on no path itself, since it depends on no parameter.
        return {name for name in before if self.nodes[name].op == "placeholder"}

    def _dominators_of_logits(self) -> dict[str, None]:
        dominators = [self.logits]
        # The last node that dominates a node is dominated by all others that do.
        before = self.dominator[self.logits]
        while before != SOURCE:
            dominators.append(before)
            before = self.dominator[before]
        return dict.fromkeys(reversed(dominators))

    def _spine(self, given: Sequence[Iterable[str]]) -> list[tuple[str, ...]]:
        """Return the cut sets of the spine: the dominators of the logits, and those given."""
        if not given:
            return [(name,) for name in self._dominators]
        # What is computed before each cut set, and with it.
        insides: dict[frozenset[str], set[str]] = {}
        for values in given:
            insides[frozenset(values)] = self.inside(values)
        for name in self._dominators:
            insides[frozenset([name])] = self.inside([name])
        # Of any two, one holds all of the other, so their sizes tell the order.
        in_order = sorted(insides, key=lambda values: len(insides[values]))
        cut_sets = []
        earlier: set[str] = set()  # what the steps so far compute
        for cut_set in in_order:
            # A value that crosses the cut before as well, such as a skip connection, is not new.
            new = sorted(cut_set - earlier, key=self._computed_at)
            main = self._main_value(new, insides[cut_set] - earlier)
            passing = self.in_order(cut_set - {main})
            cut_sets.append((*passing, main))
            earlier = insides[cut_set]
        return cut_sets

    def _main_value(self, new: list[str], inside: set[str]) -> str:
        """Return the last of some values that is computed with new parameters, or else the last.

        Args:
            new: the values that the step computes, in order.
            inside: the nodes of the step.
        """
        learned = [name for name in new if self.is_learned(name, inside)]
        return learned[-1] if learned else new[-1]

    def _steps_of_nodes(self) -> dict[str, int]:
        """Return the index of the step of each node.

        A value of a cut set gets the step that ends in the first cut set that has it.

        1. Another node gets the first step that uses its value.
        2. Exception: nothing that leads to the logits uses it, but a last write in place does, such
           as `self.mean.copy_(h.mean())`. It goes with what it reads, and the write comes after all
           earlier reads of what it writes.
        3. Exception: it is no path, but reads one, such as `mask = h > 0`. It goes with the value
           that it reads.
        4. A node is computed no later than the nodes that use its value, wherever they went. If it
           then runs before a value that it reads, no cut may lie between them (`refusals`).
        """
        step_of: dict[str, int] = {}
        for i, values in enumerate(self.cut_sets):
            for name in values:
                step_of.setdefault(name, i)
        # 1. A node comes before its users, so the steps of its users are known on the way back.
        for name in reversed(self.nodes):
            steps_of_users = _steps(self.graph.successors(name), step_of)
            if steps_of_users and name not in step_of:
                step_of[name] = min(steps_of_users)
        # 2.
        self._place_last_writes(step_of)
        # 3. In order, since such a node may read others of them.
        beside = [name for name in self.nodes if not self.is_path(name)]
        for name in beside:
            step_of[name] = self._step_beside(name, step_of)
        # 4. Only these nodes have moved.
        for name in reversed(beside):
            steps_of_users = _steps(self.graph.successors(name), step_of)
            step_of[name] = min([step_of[name], *steps_of_users])
        return step_of

    def _place_last_writes(self, step_of: dict[str, int]) -> None:
        """Give steps to the paths that lead to a write in place, but not to the logits.

        Args:
            step_of: the steps of all other paths; gets those of these.
        """
        readers: dict[int, list[str]] = {}  # the nodes so far that read a storage, by its key
        for name, node in self.nodes.items():
            if self.is_path(name) and name not in step_of:
                before = list(self.graph.predecessors(name))
                for written in facts(node).writes:
                    before += readers.get(storage_key(facts(written).example), [])
                step_of[name] = max(_steps(before, step_of), default=0)
            for arg in node.all_input_nodes:
                value = facts(arg).example
                if isinstance(value, Tensor):
                    readers.setdefault(storage_key(value), []).append(name)

    def _step_beside(self, name: str, step_of: dict[str, int]) -> int:
        """Return the step of a node that is no path.

        A tensor stays in the step of the path that it reads, since behind a cut the value is
        normalised. A size, and zeros of that size, are the same behind the cut. So they may be
        computed in the step after as well, where the value is at hand.

        Args:
            name: of the node.
            step_of: the steps of the nodes that it reads; its own, unless nothing uses its value.
        """
        node = self.nodes[name]
        sources = list(self.graph.predecessors(name))
        steps_of_paths = [step_of[source] for source in sources if self.is_path(source)]
        reads_values = holds_tensor(facts(node).example) and not makes_values(node.target)
        if steps_of_paths and reads_values:
            return max(steps_of_paths)
        earliest = max(_steps(sources, step_of), default=0)
        is_used = name in step_of  # by more than a guard
        if is_used:
            first_use = step_of[name]
            if not steps_of_paths:
                return first_use
            step_after = max(steps_of_paths) + 1
            return min(first_use, max(earliest, step_after))
        if facts(node).cost.draws:
            # A draw that nothing uses still decides what the later ones draw.
            return max(earliest, self._step_before(name, step_of))
        return earliest

    def _step_before(self, name: str, step_of: dict[str, int]) -> int:
        """Return the step of the last path that the model computes before a node."""
        names_before = list(self.nodes)[: self.position(name)]
        for each in reversed(names_before):
            if self.is_path(each):
                return step_of[each]
        return 0


def _steps(names: Iterable[str], step_of: dict[str, int]) -> list[int]:
    """Return the steps of those of the nodes that have one so far."""
    return [step_of[name] for name in names if name in step_of]


def _reached(
    starts: Iterable[str], neighbours: Callable[[str], Iterable[str]], without: set[str]
) -> set[str]:
    """Return the start nodes and all that they lead to, by paths that avoid some nodes."""
    passed = set(without)
    ahead = list(starts)
    while ahead:
        name = ahead.pop()
        if name not in passed:
            passed.add(name)
            ahead += neighbours(name)
    return passed - without


def _graph(nodes: dict[str, Node], layers: Layers) -> nx.DiGraph:
    """Return the graph of all nodes, with the edges and attributes that `Dataflow.graph` has."""
    graph = nx.DiGraph()
    dependences: dict[str, Dependence] = {}
    writers = _writers_of_state(nodes, layers)
    for name, node in nodes.items():
        nodes_before = (*node.all_input_nodes, *facts(node).after, *writers.get(name, ()))
        sources = [source.name for source in nodes_before]
        own = _dependence(node, layers, [dependences[source] for source in sources])
        dependences[name] = own
        learns = any(can_learn(tensor) for tensor in _values_of(node))
        is_path = learns and own.on_input and own.on_parameter
        # A value of parameters alone is a weight: one that is read by its name, or one that is
        # computed from others, as in `F.linear(x, weight.tanh())`.
        weights = [
            source
            for source in sources
            if dependences[source].on_parameter and not graph.nodes[source]["path"]
        ]
        is_learned = bool(layers.parameters(node)) or bool(weights)
        graph.add_node(name, path=is_path, learned=is_learned)
        for source in sources:
            graph.add_edge(source, name)
    # To tell picked weights from streams takes the whole graph, with both marked as paths.
    for name in picked_weights(graph, nodes, layers):
        graph.nodes[name]["path"] = False
    return graph


def _writers_of_state(nodes: dict[str, Node], layers: Layers) -> dict[str, list[Node]]:
    """Return the nodes that write on parameters which a later node reads, by its name.

    In `self.layer.weight.data.clamp_(-1, 1); y = self.layer(x)` no argument of the call tells that
    it comes after the write.

    Returns:
        The nodes that write, by the name of the node that reads.
    """
    # A write is known by the example of a value, a layer by its parameter. The example is a copy
    # with a storage of its own, so this leads from one to the other.
    key_of_parameter: dict[int, int] = {}  # by the key of its example
    writers: dict[int, list[Node]] = {}  # so far, by the key of the parameter
    found: dict[str, list[Node]] = {}
    for name, node in nodes.items():
        if node.op == "get_attr":
            for parameter in layers.parameters(node).values():
                for example in _values_of(node):
                    key_of_parameter[storage_key(example)] = storage_key(parameter)
        if writers:  # few models have any, and to look at each state takes time
            for tensor in layers.state(node).values():
                found.setdefault(name, []).extend(writers.get(storage_key(tensor), []))
        if node.op == "call_module":
            continue
        for written in facts(node).writes:
            key = key_of_parameter.get(storage_key(facts(written).example))
            if key is not None:
                writers.setdefault(key, []).append(node)
    return found


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
    # First of all: a node may read a whole module, so that its value is no tensor.
    if node.op == "get_attr" and layers.parameters(node):
        return Dependence(on_parameter=True)
    computes_tensors = next(_values_of(node), None) is not None
    if not computes_tensors:
        return Dependence()
    if node.op == "placeholder":
        return Dependence(on_input=True)
    has_parameters = bool(layers.parameters(node))
    if _stops_gradient(node) and not has_parameters:
        return Dependence()
    read = [each for each in node.all_input_nodes if holds_tensor(facts(each).example)]
    if makes_values(node.target) and len(read) == 1:
        return Dependence()  # it reads the shape of that tensor, as `torch.zeros_like(x)` does
    on_input = any(source.on_input for source in sources)
    on_parameter = any(source.on_parameter for source in sources)
    return Dependence(on_input, on_parameter or has_parameters)


def _stops_gradient(node: Node) -> bool:
    """Return whether a module's value has no gradient though its input has.

    A module that computes rotary positions is one: it reads no more than the dtype of its input.
    """
    if node.op != "call_module":
        return False
    reads_gradient = any(carries_gradient(source) for source in node.all_input_nodes)
    return reads_gradient and not carries_gradient(node)


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
