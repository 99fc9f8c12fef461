"""A graph module that is pickled by the nodes of its graph.

fx pickles the code of a graph, and traces that code again when it is loaded. What no input leads to
then runs once and never again: a write on a buffer, a random number that is drawn.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from sffx.picklable import require_picklable


@dataclass(frozen=True)
class _Place:
    """Stands for a node among the arguments of another one.

    Attributes:
        index: of the node, in the order of the graph.
    """

    index: int


@dataclass(frozen=True)
class _Named:
    """Stands for a function or a constant of torch that pickle cannot hold.

    `F.max_pool2d` is the case. torch makes it inside another function, and gives it the name under
    which it can be read.

    Attributes:
        path: by which it can be read, from its package on.
    """

    path: str


# The name, op, target, args and kwargs of a node.
_Record = tuple[str, str, Any, Any, Any]


class PickledGraph(fx.GraphModule):
    """A `GraphModule` whose pickle holds its nodes, without what passes have noted in `meta`."""

    def __reduce__(self) -> Any:
        require_picklable(self)
        state = dict(self.__dict__)
        graph = state.pop("_graph")
        # Code is written anew for the nodes.
        state.pop("_code", None)
        arguments = (_kind(self), type(self).__name__, state, _records(graph))
        return _unpickled, arguments


def _unpickled(
    kind: type[fx.GraphModule], name: str, state: dict[str, Any], records: list[_Record]
) -> fx.GraphModule:
    """Return the graph module of a pickle.

    Args:
        kind: its class.
        name: of the class that fx makes for it.
        state: its attributes, without the graph and its code.
        records: of the nodes, in order.
    """
    holder = nn.Module()
    holder.__dict__.update(state)
    module = kind(holder, _graph(records), class_name=name)
    # fx copies what the graph names. The rest are attributes such as a plan.
    for attribute, value in state.items():
        if not hasattr(module, attribute):
            setattr(module, attribute, value)
    return module


def _kind(module: fx.GraphModule) -> type[fx.GraphModule]:
    """Return the class of a graph module; fx gives each module a class of its own below it."""
    for kind in type(module).__mro__:
        if "<locals>" not in kind.__qualname__:
            return kind
    return fx.GraphModule


def _records(graph: fx.Graph) -> list[_Record]:
    """Return the nodes of a graph as pickle can hold them."""
    places = {node: _Place(index) for index, node in enumerate(graph.nodes)}

    def kept(argument: Any) -> Any:
        return places[argument] if isinstance(argument, fx.Node) else _reference(argument)

    records = []
    for node in graph.nodes:
        target = _reference(node.target)
        args: Any = fx.node.map_aggregate(node.args, kept)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, kept)
        records.append((node.name, node.op, target, args, kwargs))
    return records


def _graph(records: list[_Record]) -> fx.Graph:
    """Return the graph of which `_records` has written the nodes."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    # A node reads only nodes before it, so these are there already.
    def value(kept: Any) -> Any:
        return nodes[kept.index] if isinstance(kept, _Place) else _referenced(kept)

    for name, op, target, args, kwargs in records:
        own_args: Any = fx.node.map_aggregate(args, value)
        own_kwargs: Any = fx.node.map_aggregate(kwargs, value)
        node = graph.create_node(op, _referenced(target), own_args, own_kwargs, name=name)
        nodes.append(node)
    return graph


def _reference(value: Any) -> Any:
    """Return a target or a part of an argument as pickle can hold it."""
    if isinstance(value, torch.memory_format):
        return _Named(str(value))
    is_operator = isinstance(value, (OpOverload, OpOverloadPacket))
    if is_operator or "<locals>" in getattr(value, "__qualname__", ""):
        return _Named(fx.node._get_qualified_name(value))
    return value


def _referenced(reference: Any) -> Any:
    """Return that of which `_reference` has made a reference."""
    return pkgutil.resolve_name(reference.path) if isinstance(reference, _Named) else reference
