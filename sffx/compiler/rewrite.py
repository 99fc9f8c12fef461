"""Execute a block plan: each block's nodes get a graph of their own, and an outer graph calls them.

The outer graph reads as the method does:

    block_0 = self.block_0(x)
    goodness_0 = self.head_0(block_0)
    norm_0 = self.norm_0(block_0.detach())
    ...
    classifier = self.classifier(norm_8)
    return self.readout([goodness_0, ..., goodness_8, classifier])

The rewrite decides nothing: the plan says where to cut.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from sffx.blocks import Block, BlockPlan
from sffx.compiler.facts import BlockFacts, facts, set_block_facts
from sffx.compiler.trace.trace import Trace
from sffx.learning.readouts import Readout
from sffx.net import with_plan
from sffx.parts import CLASSIFIER, READOUT, goodness_name, head_name, norm_name
from sffx.tensors import storage_key


def rewrite(
    trace: Trace, plan: BlockPlan, heads: list[nn.Module], norms: list[nn.Module | None]
) -> fx.GraphModule:
    """Return the cut model.

    Args:
        trace: of the model; its modules are moved into the result.
        plan: made from the same trace.
        heads: one for each feature block.
        norms: one for each feature block; None leaves the output as it is, but for the detach.
    """
    traced = {node.name: node for node in trace.graph.nodes}
    root = nn.Module()
    for block in plan.all_blocks:
        root.add_module(block.target, block_module(trace.root, block, traced))
    added: dict[str, nn.Module] = {}
    for i, (head, norm) in enumerate(zip(heads, norms, strict=True)):
        added[head_name(i)] = head
        if norm is not None:
            added[norm_name(i)] = norm
    added[READOUT] = Readout()
    for name, module in added.items():
        root.add_module(name, module.train(trace.root.training))
    root.training = trace.root.training
    graph = _outer_graph(traced, plan, norms)
    graph.lint()
    net = fx.GraphModule(root, graph, class_name=f"SFF{plan.model}")
    return with_plan(net, plan, trace.root)


def block_module(root: nn.Module, block: Block, traced: dict[str, fx.Node]) -> fx.GraphModule:
    """Return one block: a graph of its inputs, its nodes, its output and its side values.

    `block_facts(node)` is the record of each of its nodes.

    Args:
        root: the traced model, whose modules the block gets.
        block: its description.
        traced: the nodes of the traced model, by name.
    """
    graph = fx.Graph()
    copies: dict[str, fx.Node] = {}
    for name in block.inputs:
        copies[name] = graph.create_node("placeholder", name, name=name)
        set_block_facts(copies[name], _facts_of_input(traced[name]))
    for name in block.nodes:
        node = traced[name]
        copy = graph.node_copy(node, lambda arg: copies[arg.name])
        copy.meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        set_block_facts(copy, _facts_of_node(node))
        copies[name] = copy
    outputs = tuple(copies[name] for name in (block.output, *block.sides))
    graph.output(outputs if block.sides else outputs[0])
    graph.lint()
    return fx.GraphModule(root, graph, class_name=block.target.title().replace("_", ""))


def _facts_of_input(node: fx.Node) -> BlockFacts:
    memory = _memory(node)
    # The model's own input is no foreign value: a write on it is the model's own doing.
    is_foreign = node.op != "placeholder" and memory is not None
    return BlockFacts(origin=node.name, memory=memory, is_foreign=is_foreign)


def _facts_of_node(node: fx.Node) -> BlockFacts:
    record = facts(node)
    writes = frozenset(storage_key(facts(written).example) for written in record.writes)
    return BlockFacts(node.name, _memory(node), writes, record.read_behind)


def _memory(node: fx.Node) -> int | None:
    """Return a key of the memory of a node's value, which its views share; None for no tensor."""
    value = facts(node).example
    return storage_key(value) if isinstance(value, Tensor) else None


def _outer_graph(
    traced: dict[str, fx.Node], plan: BlockPlan, norms: list[nn.Module | None]
) -> fx.Graph:
    graph = fx.Graph()
    values: dict[str, Any] = {}  # by the name of the traced node that computes it
    for node in traced.values():
        if node.op == "placeholder":
            values[node.name] = graph.create_node("placeholder", str(node.target), name=node.name)
    scores: list[fx.Node] = []
    for i, block in enumerate(plan.blocks):
        inputs = tuple(values[name] for name in block.inputs)
        result = _call(graph, block.target, block.target, inputs)
        output = _unpack(graph, block, result, values, traced)
        mask = (values[block.mask],) if block.mask else ()
        scores.append(_call(graph, head_name(i), goodness_name(i), (output, *mask)))
        value = graph.create_node("call_method", "detach", (output,), name=f"detached_{i}")
        if norms[i] is not None:
            value = _call(graph, norm_name(i), norm_name(i), (value, *mask))
        values[block.output] = value
    inputs = tuple(values[name] for name in plan.classifier.inputs)
    scores.append(_call(graph, CLASSIFIER, CLASSIFIER, inputs))
    graph.output(_call(graph, READOUT, READOUT, (scores,)))
    return graph


def _call(graph: fx.Graph, target: str, name: str, args: tuple[Any, ...]) -> fx.Node:
    return graph.create_node("call_module", target, args, name=name)


def _unpack(
    graph: fx.Graph,
    block: Block,
    result: fx.Node,
    values: dict[str, Any],
    traced: dict[str, fx.Node],
) -> fx.Node:
    """Return a block's output, taken from its result, and add its side values to `values`.

    A side value that carries gradient is detached.
    """
    if not block.sides:
        return result
    output = _item(graph, result, 0, f"{block.target}_output")
    for i, name in enumerate(block.sides, start=1):
        side = _item(graph, result, i, name)
        is_detached = name in block.detached
        values[name] = _detached(graph, side, facts(traced[name]).example) if is_detached else side
    return output


def _detached(graph: fx.Graph, side: fx.Node, example: Any) -> Any:
    """Return a side value, detached; of a tuple or a list, each tensor in it, however deep."""
    if isinstance(example, Tensor):
        return graph.create_node("call_method", "detach", (side,), name=f"{side.name}_detached")
    if not isinstance(example, (tuple, list)):
        return side
    items = [_item(graph, side, i, f"{side.name}_{i}") for i in range(len(example))]
    parts = zip(items, example, strict=True)
    return type(example)(_detached(graph, item, part) for item, part in parts)


def _item(graph: fx.Graph, value: fx.Node, index: int, name: str) -> fx.Node:
    return graph.create_node("call_function", operator.getitem, (value, index), name=name)
