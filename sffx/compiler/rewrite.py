"""Execute a block plan: each block's nodes get a graph of their own, and an outer graph calls them.

The outer graph reads as the method does:

    block_0 = self.block_0(x)
    goodness_0 = self.head_0(block_0)
    norm_0 = self.norm_0(block_0.detach())
    ...
    classifier = self.classifier(norm_8)
    return self.readout([goodness_0, ..., goodness_8, classifier])

Where several values cross a cut, each has a detach and a norm of its own (`norm_0_1`). The head
reads those that lead to no other of them: `goodness_0 = self.head_0(block_0_output, left)`.

An objective may predict by trials (`sffx.objective`). Then each input goes through a module first,
`trial_0 = self.trial_0(x)`, and so does what the classifier reads,
`choice_0 = self.choice_0(norm_8)`.

The rewrite decides nothing: the plan says where to cut.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sffx.blocks import Block, BlockPlan, Output
from sffx.compiler.facts import (
    BlockFacts,
    facts,
    module_stack,
    set_block_facts,
    storages_written,
)
from sffx.compiler.trace.trace import Trace
from sffx.learning.readouts import Readout
from sffx.nested import rebuilt
from sffx.net import CutModel, with_plan
from sffx.parts import (
    CLASSIFIER,
    READOUT,
    choice_name,
    detached_name,
    goodness_name,
    head_name,
    name_in_block,
    norm_name,
    trial_name,
)
from sffx.pickled_graph import PickledGraph
from sffx.tensors import storage_key


def rewrite(
    trace: Trace, plan: BlockPlan, heads: list[nn.Module], norms: list[list[nn.Module | None]]
) -> CutModel:
    """Return the cut model.

    Args:
        trace: of the model; its modules are moved into the result.
        plan: made from the same trace.
        heads: one for each feature block.
        norms: one for each output of each feature block; None leaves the output as it is, but for
            the detach.
    """
    traced = {node.name: node for node in trace.graph.nodes}
    trials = _trials(plan)
    choices = _choices(plan)
    parts = {**_heads_and_norms(heads, norms), **trials, **choices}
    parts[READOUT] = Readout(plan.task, plan.objective.skips)
    root = nn.Module()
    root.training = trace.root.training
    for block in plan.all_blocks:
        # The layers of a block keep the mode that they had in the model.
        root.add_module(block.target, block_module(trace.root, block, traced))
    for name, part in parts.items():
        # New parts have the mode of the whole model.
        root.add_module(name, part.train(trace.root.training))
    graph = _outer_graph(plan, traced, norms, trials, choices)
    net = GraphModule(root, graph, class_name=f"SFF{plan.model}")
    return with_plan(net, plan, trace.root)


def _outer_graph(
    plan: BlockPlan,
    traced: dict[str, Node],
    norms: list[list[nn.Module | None]],
    trials: dict[str, nn.Module],
    choices: dict[str, nn.Module],
) -> Graph:
    """Return the graph that calls the blocks, the heads and the norms.

    Args:
        plan: of the blocks.
        traced: the nodes of the traced model, by name.
        norms: as `rewrite` takes them.
        trials: the modules that inputs go through at prediction, by name.
        choices: those that the values of the classifier go through, by name.
    """
    outer = _OuterGraph(traced)
    outer.add_inputs()
    outer.add_trials(trials)
    for i, block in enumerate(plan.blocks):
        has_norm = [norm is not None for norm in norms[i]]
        outer.add_block(i, block, has_norm)
    outer.add_choices(plan.classifier, choices)
    outer.add_end(plan.classifier)
    outer.graph.lint()
    return outer.graph


def _heads_and_norms(
    heads: list[nn.Module], norms: list[list[nn.Module | None]]
) -> dict[str, nn.Module]:
    """Return the heads and the norms, by the names of their parts."""
    parts: dict[str, nn.Module] = {}
    for i, head in enumerate(heads):
        parts[head_name(i)] = head
    for i, own_norms in enumerate(norms):
        for value, norm in enumerate(own_norms):
            if norm is not None:
                parts[norm_name(i, value)] = norm
    return parts


def _trials(plan: BlockPlan) -> dict[str, nn.Module]:
    """Return the modules that inputs go through at prediction, by the names of their parts."""
    module_of_input = plan.objective.trials(plan.inputs, plan.num_classes)
    trials = {}
    for i, each in enumerate(plan.inputs):
        if each.name in module_of_input:
            trials[trial_name(i)] = module_of_input[each.name]
    return trials


def _choices(plan: BlockPlan) -> dict[str, nn.Module]:
    """Return a module for each value that the classifier reads, if the objective has such ones."""
    choices = {}
    for i in range(len(plan.classifier.inputs)):
        choice = plan.objective.choice(plan.num_classes)
        if choice is not None:
            choices[choice_name(i)] = choice
    return choices


def block_module(root: nn.Module, block: Block, traced: dict[str, Node]) -> PickledGraph:
    """Return one block: a graph of its inputs, its nodes, its output and its side values.

    `block_facts(node)` is the record of each of its nodes.

    Args:
        root: the traced model, whose modules the block gets.
        block: its description.
        traced: the nodes of the traced model, by name.
    """
    graph = Graph()
    copies: dict[str, Node] = {}
    for name in block.inputs:
        copies[name] = graph.create_node("placeholder", name, name=name)
        set_block_facts(copies[name], _facts_of_input(traced[name]))
    for name in block.nodes:
        node = traced[name]
        copy = graph.node_copy(node, lambda arg: copies[arg.name])
        if copy.op in ("call_module", "get_attr"):
            copy.target = name_in_block(str(copy.target))
        # The rest of the trace's records would keep its fake tensors alive.
        copy.meta = {"nn_module_stack": module_stack(node)}
        set_block_facts(copy, _facts_of_node(node))
        copies[name] = copy
    output = copies[block.output]
    sides = [copies[name] for name in block.sides]
    graph.output((output, *sides) if sides else output)
    graph.lint()
    class_name = block.target.title().replace("_", "")  # "block_0" becomes "Block0"
    return PickledGraph(_renamed(root), graph, class_name=class_name)


def _renamed(root: nn.Module) -> nn.Module:
    """Return a module that holds what the model holds, by the names that they have in a block.

    fx copies from it what the graph of a block reads. Its nodes have these names as targets.
    """
    holder = nn.Module()
    holder.training = root.training
    # A forward may read tensors in plain attributes as well.
    for name, value in vars(root).items():
        if isinstance(value, Tensor):
            holder.__dict__[name_in_block(name)] = value
    # Into the dicts themselves, which may hold None, as for a layer without a bias.
    for kind in ("_modules", "_parameters", "_buffers"):
        for name, value in vars(root)[kind].items():
            vars(holder)[kind][name_in_block(name)] = value
    unsaved = {name_in_block(name) for name in root._non_persistent_buffers_set}
    holder._non_persistent_buffers_set.update(unsaved)
    return holder


def _facts_of_input(node: Node) -> BlockFacts:
    """Return the record of a block's placeholder, given the traced node that computes its value."""
    memory = _memory(node)
    # The model's own input is no foreign value: a write on it is the model's own doing.
    is_foreign = node.op != "placeholder" and memory is not None
    return BlockFacts(origin=node.name, memory=memory, is_foreign=is_foreign)


def _facts_of_node(node: Node) -> BlockFacts:
    """Return the record of a block's own node, given the traced node that it is a copy of."""
    record = facts(node)
    writes = frozenset(storages_written([node]))
    return BlockFacts(
        origin=node.name, memory=_memory(node), writes=writes, read_behind=record.read_behind
    )


def _memory(node: Node) -> int | None:
    """Return a key of the memory of a node's value, which its views share; None for no tensor."""
    value = facts(node).example
    return storage_key(value) if isinstance(value, Tensor) else None


class _OuterGraph:
    """Writes the outer graph, part by part.

    Attributes:
        graph: the graph so far.
        traced: the nodes of the traced model, by name.
        values: the node of the outer graph that has the value of a traced node, by its name. After
            a cut this is the detached and normalised value.
        scores: the nodes that the readout reads.
    """

    def __init__(self, traced: dict[str, Node]) -> None:
        self.graph = Graph()
        self.traced = traced
        self.values: dict[str, Any] = {}
        self.scores: list[Node] = []

    def add_inputs(self) -> None:
        """Add the inputs of the model."""
        for name, node in self.traced.items():
            if node.op == "placeholder":
                target = str(node.target)
                self.values[name] = self.graph.create_node("placeholder", target, name=name)

    def add_trials(self, trials: Collection[str]) -> None:
        """Add the modules that inputs go through before the first block."""
        names = [name for name, node in self.traced.items() if node.op == "placeholder"]
        for i, name in enumerate(names):
            trial = trial_name(i)
            if trial in trials:
                self.values[name] = self._call(trial, trial, [self.values[name]])

    def add_choices(self, classifier: Block, choices: Collection[str]) -> None:
        """Add the modules that choose the rows which the classifier reads."""
        for i, name in enumerate(classifier.inputs):
            choice = choice_name(i)
            if choice in choices:
                self.values[name] = self._call(choice, choice, [self.values[name]])

    def add_block(self, index: int, block: Block, has_norm: Sequence[bool]) -> None:
        """Add a feature block and its head; for each of its outputs the detach and the norm.

        Args:
            index: of the block.
            block: its description.
            has_norm: for each of its outputs, whether it has a norm.
        """
        result = self._call(block.target, block.target, self._inputs_of(block))
        attached = self._outputs_of(block, result)
        # The head reads each value with its mask, if it has one, and learns through the value.
        scored: list[Any] = []
        for output in block.scored:
            scored += [attached[output.name], *self._mask_of(output)]
        goodness = self._call(head_name(index), goodness_name(index), scored)
        self.scores.append(goodness)
        # Later blocks read the values without a gradient.
        for i, output in enumerate(block.outputs):
            detached = detached_name(index, i)
            value = _detach_tensor(self.graph, attached[output.name], detached)
            if has_norm[i]:
                norm = norm_name(index, i)
                value = self._call(norm, norm, [value, *self._mask_of(output)])
            self.values[output.name] = value

    def add_end(self, classifier: Block) -> None:
        """Add the classifier, the readout and the output."""
        logits = self._call(CLASSIFIER, CLASSIFIER, self._inputs_of(classifier))
        self.scores.append(logits)
        scores = self._call(READOUT, READOUT, [self.scores])
        self.graph.output(scores)

    def _inputs_of(self, block: Block) -> list[Any]:
        return [self.values[name] for name in block.inputs]

    def _mask_of(self, output: Output) -> list[Any]:
        return [self.values[output.mask]] if output.mask else []

    def _outputs_of(self, block: Block, result: Node) -> dict[str, Node]:
        """Return a block's outputs by name, taken from its result, still with their gradient.

        The other side values are added to `values` at once, without gradient.
        """
        if not block.sides:
            return {block.output: result}
        # The result is the tuple (output, *sides).
        outputs = {block.output: _item(self.graph, result, 0, f"{block.target}_output")}
        beside = {output.name for output in block.beside}
        for i, name in enumerate(block.sides, start=1):
            side = _item(self.graph, result, i, name)
            if name in beside:
                outputs[name] = side
            elif name in block.detached:
                example = facts(self.traced[name]).example
                self.values[name] = _detached(self.graph, side, example)
            else:
                self.values[name] = side
        return outputs

    def _call(self, target: str, name: str, args: list[Any]) -> Node:
        return self.graph.create_node("call_module", target, tuple(args), name=name)


def _detached(graph: Graph, side: Node, example: Any) -> Any:
    """Return a side value, detached; of a tuple or a list, each tensor in it, however deep."""
    if isinstance(example, Tensor):
        return _detach_tensor(graph, side, f"{side.name}_detached")
    if not isinstance(example, (tuple, list)):
        return side
    parts = {}
    for i, part in enumerate(example):
        item = _item(graph, side, i, f"{side.name}_{i}")
        parts[i] = _detached(graph, item, part)
    return rebuilt(example, parts)


def _item(graph: Graph, value: Node, index: int, name: str) -> Node:
    return graph.create_node("call_function", operator.getitem, (value, index), name=name)


def _detach_tensor(graph: Graph, value: Node, name: str) -> Node:
    return graph.create_node("call_method", "detach", (value,), name=name)
