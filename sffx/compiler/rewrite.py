"""Execute a block plan: move each block's nodes into a graph of their own, and write the outer graph as the method reads.

    block_0 = self.block_0(x)
    goodness_0 = self.head_0(block_0)
    norm_0 = self.norm_0(block_0.detach())
    ...
    classifier = self.classifier(norm_8)
    return self.readout([goodness_0, ..., goodness_8, classifier])

The rewrite decides nothing: what is cut where is in the plan.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.blocks import Block, BlockPlan
from sffx.compiler.facts import BlockFacts, facts, set_block_facts
from sffx.compiler.memory import lean
from sffx.compiler.trace.trace import Trace
from sffx.errors import CutError
from sffx.learning.readouts import Readout
from sffx.parts import CLASSIFIER, READOUT, goodness_name, head_name, norm_name
from sffx.tensors import storage_key

_OUT_OF_PLACE = {
    **{
        getattr(operator, f"i{name}"): getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "matmul", "pow", "floordiv", "mod")
    },
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}

_VIEWS = (
    "flatten",
    "reshape",
    "contiguous",
    "dropout",
    "alphadropout",
    "featurealphadropout",
    "identity",
)


def rewrite(
    trace: Trace,
    plan: BlockPlan,
    heads: list[nn.Module],
    norms: list[nn.Module | None],
    *,
    recompute: bool = True,
) -> fx.GraphModule:
    """Return the cut model.

    Args:
        trace: of the model; its modules are moved into the result.
        plan: made from the same trace.
        heads: one for each feature block.
        norms: one for each feature block; None hands a block's output on as it is, but for the detach.
        recompute: whether the largest blocks compute again in their backward pass what costs little.

    Raises:
        CutError: an in-place operation writes on a value that crosses a cut, and has no form that does not.
    """
    nodes = {node.name: node for node in trace.graph.nodes}
    root = nn.Module()
    root.train(trace.root.training)
    for block in plan.all_blocks:
        root.add_module(
            block.target,
            block_module(trace, plan, block, nodes, recompute=recompute and plan.is_large(block)),
        )
    for i, (head, norm) in enumerate(zip(heads, norms, strict=True)):
        root.add_module(head_name(i), head.train(trace.root.training))
        if norm is not None:
            root.add_module(norm_name(i), norm.train(trace.root.training))
    root.add_module(READOUT, Readout().train(trace.root.training))
    graph = _outer_graph(trace, plan, norms)
    graph.lint()
    return fx.GraphModule(root, graph, class_name=f"SFF{plan.model}")


def _outer_graph(trace: Trace, plan: BlockPlan, norms: list[nn.Module | None]) -> fx.Graph:
    graph = fx.Graph()
    values: dict[str, Any] = {}
    nodes = {node.name: node for node in trace.graph.nodes}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = graph.create_node("placeholder", str(node.target), name=node.name)
    goodness: list[fx.Node] = []
    for i, block in enumerate(plan.blocks):
        result = _call(
            graph, block.target, block.target, tuple(values[name] for name in block.inputs)
        )
        output = _unpack(graph, block, result, values, nodes)
        mask = (values[block.mask],) if block.mask else ()
        goodness.append(_call(graph, head_name(i), goodness_name(i), (output, *mask)))
        detached = graph.create_node("call_method", "detach", (output,), name=f"detached_{i}")
        values[block.output] = (
            _call(graph, norm_name(i), norm_name(i), (detached, *mask))
            if norms[i] is not None
            else detached
        )
    logits = _call(
        graph, CLASSIFIER, CLASSIFIER, tuple(values[name] for name in plan.classifier.inputs)
    )
    graph.output(_call(graph, READOUT, READOUT, ([*goodness, logits],)))
    return graph


def _call(graph: fx.Graph, target: str, name: str, args: tuple[object, ...]) -> fx.Node:
    return graph.create_node("call_module", target, args, name=name)  # type: ignore[arg-type]


def _unpack(
    graph: fx.Graph,
    block: Block,
    result: fx.Node,
    values: dict[str, Any],
    nodes: dict[str, fx.Node],
) -> fx.Node:
    """Take a block's output and its side values, detached where they carry gradient, out of what it returns."""
    if not block.sides:
        return result
    output = graph.create_node(
        "call_function", operator.getitem, (result, 0), name=f"{block.target}_output"
    )
    for i, side in enumerate(block.sides, start=1):
        values[side] = graph.create_node("call_function", operator.getitem, (result, i), name=side)
        if side in block.detached:
            values[side] = _detached(graph, values[side], facts(nodes[side]).example)
    return output


def _detached(graph: fx.Graph, side: fx.Node, example: Any) -> Any:
    """Detach a side value, or each tensor of one that is a tuple or a list, however deep."""
    if isinstance(example, Tensor):
        return graph.create_node("call_method", "detach", (side,), name=f"{side.name}_detached")
    if not isinstance(example, (tuple, list)):
        return side
    items = [
        graph.create_node("call_function", operator.getitem, (side, i), name=f"{side.name}_{i}")
        for i in range(len(example))
    ]
    return type(example)(
        _detached(graph, item, part) for item, part in zip(items, example, strict=True)
    )


def block_module(
    trace: Trace, plan: BlockPlan, block: Block, nodes: dict[str, fx.Node], *, recompute: bool
) -> fx.GraphModule:
    """Build one block: its inputs as placeholders, its nodes, its output, followed by its side values.

    `block_facts(node)` is the record of each of its nodes.
    """
    graph = fx.Graph()
    values = {name: graph.create_node("placeholder", name, name=name) for name in block.inputs}
    for name, value in values.items():
        set_block_facts(value, BlockFacts(memory=_memory(nodes[name])))
    views = {name for name in block.inputs if _is_written_from_outside(nodes[name])}
    outside = {_memory(nodes[name]) for name in views}
    replaced: dict[str, nn.Module] = {}
    for name in block.nodes:
        node = nodes[name]
        writes = frozenset(storage_key(facts(written).example) for written in facts(node).writes)
        values[name] = graph.node_copy(node, lambda n: values[n.name])
        values[name].meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        record = BlockFacts(name, _memory(node), writes, facts(node).read_behind)
        set_block_facts(values[name], record)
        if any(
            read.name in views and _may_be_view(node, read, trace.root)
            for read in node.all_input_nodes[:1]
        ):
            views.add(name)
        hidden = (
            any(written.name in views for written in facts(node).writes)
            and not facts(node).read_behind
        )
        if hidden or writes & outside:
            _keep_input(values[name], node, trace.root, replaced)
    outputs = tuple(values[name] for name in (block.output, *block.sides))
    graph.output(outputs if block.sides else outputs[0])
    graph.lint()
    module = fx.GraphModule(trace.root, graph, class_name=block.target.title().replace("_", ""))
    for target, twin in replaced.items():
        owner, _, name = target.rpartition(".")
        setattr(module.get_submodule(owner), name, twin)
    # The built-in heads make a gradient of their own for what they read. Others may hand on one that they hold as well.
    feeds_head = block is not plan.classifier and not callable(plan.options.goodness)
    lean(module, feeds_head=feeds_head, recompute=recompute)
    return module


def _memory(node: fx.Node) -> int | None:
    """Return a key of the memory of a node's value, which views of it share; None for what is no tensor."""
    value = facts(node).example
    return storage_key(value) if isinstance(value, Tensor) else None


def _is_written_from_outside(node: fx.Node) -> bool:
    """Whether a block's input is a value of another block. A write on the model's own input is the model's own doing."""
    return node.op != "placeholder" and isinstance(facts(node).example, Tensor)


def _may_be_view(node: fx.Node, read: fx.Node, root: nn.Module) -> bool:
    """Whether a node returns what it reads, or a view of it, be it only in some layouts or modes other than those of the trace.

    A norm lays out its result in order, which makes a view of what was a copy; dropout returns its input in eval mode.
    """
    kind = type(root.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    name = getattr(kind, "__name__", str(kind)).lower()
    value, before = facts(node).example, facts(read).example
    is_view = (
        isinstance(value, Tensor)
        and isinstance(before, Tensor)
        and storage_key(value) == storage_key(before)
    )
    return is_view or name.startswith(_VIEWS)


def _keep_input(
    node: fx.Node, original: fx.Node, root: nn.Module, replaced: dict[str, nn.Module]
) -> None:
    """Turn an in-place operation into its twin that leaves its input alone.

    1. a module with `inplace=True`; 2. a function called with `inplace=True`; 3. an in-place operator; 4. a method `name_`.
    """
    if facts(original).read_behind:
        raise CutError(
            f"node {original.name!r} writes in place on a value that crosses a cut, and the model reads what it wrote by another name. "
            "Hint: cut elsewhere, or use the operation's result instead of the variable that it writes to"
        )
    if node.op == "call_module" and getattr(root.get_submodule(str(node.target)), "inplace", False):
        twin: Any = copy.copy(root.get_submodule(str(node.target)))
        twin.inplace = False
        replaced[str(node.target)] = twin
    elif _has_inplace(node.target):
        node.kwargs = {**node.kwargs, "inplace": False}
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        node.args = tuple(node.args[: names.index("inplace")])
    elif node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
    elif _twin_name(node.target) is not None:
        node.target = _twin_name(node.target)  # type: ignore[assignment]
    else:
        raise CutError(
            f"node {original.name!r} writes in place on a value that crosses a cut, and {original.target} has no form that does not. "
            "Hint: cut elsewhere, or write the model without this in-place operation"
        )


def _has_inplace(target: object) -> bool:
    try:
        return callable(target) and "inplace" in inspect.signature(target).parameters
    except (ValueError, TypeError):
        return False


def _twin_name(target: object) -> str | Callable[..., object] | None:
    """Return the method or torch function whose name lacks the trailing underscore."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    twin = getattr(Tensor if isinstance(target, str) else torch, name[:-1], None)
    return (name[:-1] if isinstance(target, str) else twin) if twin is not None else None
