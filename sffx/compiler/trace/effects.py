"""Writes in place: which nodes must stay for what they write, and which order they ask for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from sffx.compiler.facts import change_facts, facts, read_instead, storages_written
from sffx.compiler.trace.run_function import runs_in_one_mode
from sffx.tensors import storage_key


def set_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """Write `x[index] = value`, and return x."""
    if isinstance(x, fx.Proxy):  # fx traces the code of a graph that it unpickles
        return x.tracer.create_proxy("call_function", set_item, (x, index, value), {})
    x[index] = value
    return x


def set_item_of_copy(x: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of x in which `x[index]` is a value."""
    return set_item(x.clone(), index, value)


def drop_dead_code(graph: fx.Graph) -> None:
    """Drop the nodes that neither the output needs nor a write asks for, and complete the facts.

    Sets `after` and `read_behind` of every node.
    """
    _read_results_of_writes(graph)
    _order_hidden_reads(graph)
    needed = _written_for_others(graph)
    lasting = _lasting_storages(graph)
    graph.eliminate_dead_code(lambda node: node in needed or _has_effect(node, lasting))
    _note_read_behind(graph)


def order_writes(graph: fx.Graph, choices: Collection[fx.Node]) -> None:
    """Set `after` and `read_behind` of every node of a graph that was merged from two.

    Args:
        graph: to change.
        choices: the nodes that pick a value by the mode. A value of eval mode is not read in train
            mode, so what train mode alone writes on it does not come before the choice.
    """
    _order_hidden_reads(graph)
    for node in choices:
        writers = [writer for writer in facts(node).after if not runs_in_one_mode(writer)]
        change_facts(node, after=tuple(writers))
    _note_read_behind(graph)


def _note_read_behind(graph: fx.Graph) -> None:
    needed = _written_for_others(graph)
    for node in graph.nodes:
        change_facts(node, read_behind=node in needed)


def _read_results_of_writes(graph: fx.Graph) -> None:
    """Let what reads a tensor after a write in place read the result of the write.

    `x.add_(1); y = x * 2` becomes `written = x.add_(1); y = written * 2`.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for written in facts(node).writes:
            is_same = _is_same_tensor(facts(node).example, facts(written).example)
            if written is node or not is_same:
                continue
            later = [user for user in written.users if position[user] > position[node]]
            for user in later:
                read_instead(user, written, node)


def _is_same_tensor(value: Any, other: Any) -> bool:
    """Whether two names are of one tensor, and not of different views of it."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    if storage_key(value) != storage_key(other) or value.dtype != other.dtype:
        return False
    place = (value.storage_offset(), value.shape, value.stride())
    place_of_other = (other.storage_offset(), other.shape, other.stride())
    return place == place_of_other


def _written_for_others(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose writes another node reads although they are no argument of it."""
    writers: set[fx.Node] = set()
    for node in graph.nodes:
        writers.update(facts(node).after)
    return writers


def _lasting_storages(graph: fx.Graph) -> set[int]:
    """Return the keys of the storages that outlive a call: those of inputs and of the model."""
    lasting: set[int] = set()
    for node in graph.nodes:
        value = facts(node).example
        if node.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
            lasting.add(storage_key(value))
    return lasting


def _has_effect(node: fx.Node, lasting: set[int]) -> bool:
    """Whether a node must stay although nothing reads it."""
    if node.op in ("placeholder", "output"):
        return True
    # Storages are compared, since a view of a buffer may be written, or what a write returned.
    if not lasting.isdisjoint(storages_written([node])):
        return True
    # Assertions can go: the trace has settled what they say.
    return node.op == "call_function" and node.target is not torch._assert and node.is_impure()


def _order_hidden_reads(graph: fx.Graph) -> None:
    """Set `after` of each node that reads what an earlier node has written by another name.

    `y = x.view(-1); y.add_(1); z = x * 2` is the case: the product reads x, and no argument says
    that it comes after the sum.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    writers: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        after: list[fx.Node] = []
        for arg in node.all_input_nodes:
            value = facts(arg).example
            if isinstance(value, Tensor):
                writers_of_value = writers.get(storage_key(value), [])
                after += _behind(writers_of_value, position[arg], position)
        change_facts(node, after=tuple(after))
        for written in facts(node).writes:
            writers.setdefault(storage_key(facts(written).example), []).append(node)


def _behind(nodes: list[fx.Node], place: int, position: dict[fx.Node, int]) -> list[fx.Node]:
    """Return those of the nodes, which are in order, that come after a place."""
    # By bisection: a residual stream may have as many writers as the model has layers.
    return nodes[bisect_right(nodes, place, key=position.__getitem__) :]
