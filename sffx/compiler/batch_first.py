"""Batch-first views of values whose batch is another axis.

Layers of sequences may read (T, B, C). A cut needs a value whose first axis is the batch. So where
a module returns another value, or paths join in one, this pass adds two views to the traced graph:
one that is batch first, where a cut may lie, and one back, which all readers of the value read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from sffx.compiler.dataflow import Dataflow
from sffx.compiler.examples import TRACE_BATCH
from sffx.compiler.facts import Facts, change_facts, facts, set_facts
from sffx.compiler.layers import Layers, scopes
from sffx.compiler.trace.trace import Trace


def add_batch_first_views(trace: Trace) -> None:
    """Add the views to a traced graph, in place."""
    graph = trace.graph
    if not any(_batch_axis(facts(node).example) for node in graph.nodes):
        return
    flow = Dataflow(trace, Layers(trace.root))
    for name in flow.spine:
        node = flow.nodes[name]
        axis = _batch_axis(facts(node).example)
        is_join = flow.paths.in_degree(name) > 1
        if axis and (is_join or _ends_a_module(node)):
            _add_views(node, axis)
    graph.lint()


def _batch_axis(value: object) -> int:
    """Return the batch axis of a float tensor with two more axes, 0 for all other values."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
        return 0
    axes = [i for i, size in enumerate(value.shape) if size == TRACE_BATCH]
    return axes[0] if len(axes) == 1 else 0


def _ends_a_module(node: Node) -> bool:
    """Return whether a module around a node is around none of the nodes that read its value."""
    return not _scopes_of_readers(node).issuperset(scopes(node))


def _scopes_of_readers(node: Node) -> set[str]:
    around: set[str] = set()
    for reader in node.users:
        around.update(scopes(reader))
    return around


def _add_views(node: Node, axis: int) -> None:
    readers = list(node.users)
    stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
    # The way back lies outside the modules that end here, which may be blocks.
    outside = {}
    for key, module in stack.items():
        if module[0] in _scopes_of_readers(node):
            outside[key] = module
    batch_first = _add_view(node, (axis, 0), f"{node.name}_batch_first", stack)
    back = _add_view(batch_first, (0, axis), f"{node.name}_back", outside)
    for reader in readers:
        reader.replace_input_with(node, back)
        writes = facts(reader).writes
        if node in writes:
            written = [back if value is node else value for value in writes]
            change_facts(reader, writes=tuple(written))


def _add_view(source: Node, move: tuple[int, int], name: str, stack: dict[str, Any]) -> Node:
    """Add a view of a value behind it, with one axis moved.

    Args:
        source: computes the value.
        move: the axis and its new place.
        name: of the view.
        stack: the modules around the view, as fx records them.
    """
    graph = source.graph
    with graph.inserting_after(source):
        view = graph.create_node("call_method", "movedim", (source, *move), name=name)
    view.meta["nn_module_stack"] = stack
    set_facts(view, Facts(example=facts(source).example.movedim(*move)))
    return view
