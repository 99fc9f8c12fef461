"""Batch-first views of values whose batch is another axis, or is folded with others.

Layers of sequences may read (T, B, C); those of images may read instances or frames of all samples
at once, (B * N, C, H, W). A cut needs a value whose first axis is the batch. So where a module
returns a value of another kind, or paths join in one, this pass adds two views to the traced graph.
One is batch first: a cut may lie behind it. The other is the way back, which all readers read.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sffx.blocks import BatchAxis
from sffx.compiler.batch_axis import starts_with_batch
from sffx.compiler.dataflow import Dataflow
from sffx.compiler.facts import Facts, change_facts, facts, module_stack, read_instead, set_facts
from sffx.compiler.layers import Layers, scopes
from sffx.compiler.trace.trace import Trace


def add_batch_first_views(trace: Trace) -> None:
    """Add the views to a traced graph, in place."""
    graph = trace.graph
    if not any(_viewed_axis(node) for node in graph.nodes):
        return
    flow = Dataflow(trace, Layers(trace.root))
    batch_first = next(node for node in graph.nodes if starts_with_batch(facts(node).batch))
    spine = set(flow.spine)
    for name, node in flow.nodes.items():
        axis = _viewed_axis(node)
        is_on_spine = name in spine
        if axis and flow.leads_to_logits(name) and _may_be_cut_after(flow, name, is_on_spine):
            view = _add_views(node, axis, batch_first, is_alone=is_on_spine)
            if is_on_spine:
                batch_first = view
        elif is_on_spine and starts_with_batch(facts(node).batch):
            batch_first = node
    graph.lint()


def _may_be_cut_after(flow: Dataflow, name: str, is_on_spine: bool) -> bool:
    """Return whether a cut may lie behind a value.

    On the spine it may if a module returns the value, or if paths join in it. Where other streams
    run beside it, both must be so.
    """
    is_join = flow.paths.in_degree(name) > 1
    if is_on_spine:
        return is_join or _leaves_a_module(flow.nodes[name])
    return is_join and _leaves_a_module(flow.nodes[name])


def _viewed_axis(node: Node) -> BatchAxis | None:
    """Return the batch axis of a float tensor that can have a batch-first view, and needs one."""
    value, batch = facts(node).example, facts(node).batch
    if not isinstance(value, Tensor) or not value.is_floating_point() or batch is None:
        return None
    if batch.permuted:
        return None
    if batch.rows == 1:
        return batch if batch.axis > 0 and value.ndim > 2 else None
    is_ordered = batch.slower in (1, batch.rows)
    return batch if is_ordered and value.ndim > 1 else None


def _leaves_a_module(node: Node) -> bool:
    """Return whether a reader of a node's value lies outside one of the modules around the node.

    Other readers may lie inside, as in the inner stream of a TNT.
    """
    owner = node
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        if source.op == "call_module":
            # An LSTM returns its states as well, so its output is picked outside of it.
            owner = source
    around = set(scopes(owner))
    return any(not around.issubset(scopes(reader)) for reader in node.users)


def _add_views(node: Node, batch: BatchAxis, before: Node, *, is_alone: bool) -> Node:
    """Add the views behind a node, and return the batch-first one.

    Args:
        node: computes the value.
        batch: its batch axis.
        before: the last value before it whose first axis is the batch.
        is_alone: whether no stream runs beside the value. Where one does, a cut may lie between the
            readers of the value, so each has a view back of its own.
    """
    # Read before the views are added, which are readers as well.
    readers = list(node.users)
    stack = module_stack(node)
    name = node.name
    is_folded = batch.rows > 1
    view = node
    axis = batch.axis
    if is_folded:
        view, axis = _add_unfolded(node, batch, before, stack)
    if axis > 0:
        view = _add_call(view, "movedim", (view, axis, 0), f"{name}_batch_first", stack)
    change_facts(view, batch=BatchAxis(0), is_folded=is_folded)
    if is_alone:
        around = _in_common(stack, readers)
        back = _add_back(view, view, axis, batch, name, around)
        for reader in readers:
            read_instead(reader, node, back)
        return view
    for reader in readers:
        around = _in_common(stack, [reader])
        back = _add_back(reader.prev, view, axis, batch, name, around)
        read_instead(reader, node, back)
    return view


def _in_common(stack: dict[str, Any], readers: list[Node]) -> dict[str, Any]:
    """Return those of the modules around a node that are around a reader as well.

    The way back lies outside the modules that end in the node, which may be blocks.
    """
    around: set[str] = set()
    for reader in readers:
        around.update(scopes(reader))
    return {key: module for key, module in stack.items() if module[0] in around}


def _add_back(
    after: Node, view: Node, axis: int, batch: BatchAxis, name: str, stack: dict[str, Any]
) -> Node:
    """Add the views back from a batch-first view, and return the last one.

    Args:
        after: the node that they come behind.
        view: the batch-first view.
        axis: of the samples before they came first.
        batch: the batch axis of the value.
        name: of the node that computes the value.
        stack: the modules around the views, as fx records them.
    """
    back = view
    if axis > 0:
        back = _add_call(after, "movedim", (back, 0, axis), f"{name}_back", stack)
        after = back
    if batch.rows > 1:
        args = (back, batch.axis, batch.axis + 1)
        back = _add_call(after, "flatten", args, f"{name}_folded", stack)
    change_facts(back, batch=batch)
    return back


def _add_unfolded(
    node: Node, batch: BatchAxis, before: Node, stack: dict[str, Any]
) -> tuple[Node, int]:
    """Add a view with an axis for the samples and one for the rows of each.

    Returns:
        The view, and its axis of the samples.
    """
    # The size is read off the last value that a cut may have given to this block.
    size = _add_call(node, "size", (before, 0), f"{node.name}_samples", stack)
    change_facts(size, of_batch=True)
    # Either whole batches lie behind each other, or the rows of each sample.
    has_whole_batches = batch.slower == batch.rows
    sizes = (-1, size) if has_whole_batches else (size, -1)
    axis = batch.axis + 1 if has_whole_batches else batch.axis
    name = f"{node.name}_unfolded" if axis > 0 else f"{node.name}_batch_first"
    view = _add_call(size, "unflatten", (node, batch.axis, sizes), name, stack)
    change_facts(view, batch=BatchAxis(axis))
    return view, axis


def _add_call(
    after: Node, method: str, args: tuple[Any, ...], name: str, stack: dict[str, Any]
) -> Node:
    """Add a call of a method behind a node, and what it returns as its facts.

    Args:
        after: the node.
        method: of the first argument.
        args: nodes, and numbers.
        name: of the new node.
        stack: the modules around it, as fx records them.
    """
    graph = after.graph
    with graph.inserting_after(after):
        node = graph.create_node("call_method", method, args, name=name)
    node.meta["nn_module_stack"] = stack
    example: Any = map_arg(args, lambda arg: facts(arg).example)
    other: Any = map_arg(args, lambda arg: facts(arg).other)
    resized: Any = map_arg(args, lambda arg: facts(arg).resized)
    values = [_called(method, example), _called(method, other)]
    if resized[0] is not None:
        values.append(_called(method, resized))
    set_facts(node, Facts(*values))
    return node


def _called(method: str, args: tuple[Any, ...]) -> Any:
    source, *rest = args
    return getattr(source, method)(*rest)
