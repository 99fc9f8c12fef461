"""The inside of a block with fewer parts: a module that holds several layers becomes one part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sffx.blocks import Block, Node
from sffx.draw.fold import relative

# More parts than this in a block are too many to follow.
MOST = 32


def grouped(block: Block, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return the nodes of a block; where there are many, those of one module become one node.

    Modules are taken as deep as the number allows. A join that only one module reads, such as the
    concatenation before a dense layer, belongs to that module.

    Args:
        block: that the nodes are of.
        nodes: in the order they run. Their `reads` name each other or values from outside.
    """
    if len(nodes) <= MOST:
        return tuple(nodes)
    deepest = max(len(_path(node, block)) for node in nodes)
    best = tuple(nodes)
    # From the deepest modules to the outermost: the deeper they are, the more a drawing says.
    for depth in range(deepest - 1, 0, -1):
        found = _grouped_at(depth, block, nodes)
        if len(found) < len(best):
            best = found
        if len(best) <= MOST:
            break
    return best


def _path(node: Node, block: Block) -> list[str]:
    """Return the modules around a layer and the layer itself: ["attn", "proj"]; [] of functions."""
    return relative(node.call, block).split(".") if node.is_module else []


def _grouped_at(depth: int, block: Block, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return one node for each module at a depth, and the nodes outside of such modules.

    The nodes stay as they are if two values of a module leave the block, or if modules would read
    each other.
    """
    leaving = {block.output, *block.sides}
    group_of = _groups_at(depth, block, nodes)
    _absorb_joins(nodes, group_of, leaving)
    members: dict[str, list[Node]] = {}
    for node in nodes:
        members.setdefault(group_of[node.name], []).append(node)
    # Later blocks read a value by its name. So a group has the name of the value that leaves it.
    name_of: dict[str, str] = {}
    for group, own in members.items():
        leaving_here = [node.name for node in own if node.name in leaving]
        if len(leaving_here) > 1:
            return tuple(nodes)
        name_of[group] = leaving_here[0] if leaving_here else own[-1].name
    merged = []
    for group, own in members.items():
        merged.append(_merged(group, own, block, group_of, name_of))
    return _in_order(merged) or tuple(nodes)


def _groups_at(depth: int, block: Block, nodes: Sequence[Node]) -> dict[str, str]:
    """Return the group of each node: a module at a depth, or the node's own name.

    At depth 1, the layers "attn.qkv" and "attn.proj" are in the group "attn".
    """
    group_of: dict[str, str] = {}
    for node in nodes:
        path = _path(node, block)
        # A layer at that depth or above is a part of its own.
        is_inside = len(path) > depth
        group_of[node.name] = ".".join(path[:depth]) if is_inside else node.name
    return group_of


def _absorb_joins(nodes: Sequence[Node], group_of: dict[str, str], leaving: set[str]) -> None:
    """Put each join that only one module reads into the group of that module."""
    readers: dict[str, set[str]] = {}
    # From the last node on, so that the groups of all readers are known.
    for node in reversed(nodes):
        groups = readers.get(node.name, set())
        is_inner = not node.is_module and node.name not in leaving
        if is_inner and len(groups) == 1:
            group_of[node.name] = next(iter(groups))
        for read in node.reads:
            readers.setdefault(read, set()).add(group_of[node.name])


def _merged(
    group: str,
    own: Sequence[Node],
    block: Block,
    group_of: dict[str, str],
    name_of: dict[str, str],
) -> Node:
    """Return one node for the nodes of a group; its reads name other such nodes.

    Args:
        group: its name, relative to the block.
        own: the nodes of the group.
        block: of all nodes.
        group_of: the group of each node by the node's name.
        name_of: the name of the new node of each group.
    """
    # A dict has each source once, in order.
    reads: dict[str, None] = {}
    for node in own:
        for read in node.reads:
            source = group_of.get(read)
            if source is None:  # a value from outside
                reads[read] = None
            elif source != group:  # an edge inside the group is not drawn
                reads[name_of[source]] = None
    layers = [node for node in own if node.is_module]
    if len(layers) < 2:
        # A layer with the join before it, or no layer at all.
        shown = (layers or own)[-1]
        return replace(shown, name=name_of[group], reads=tuple(reads))
    # A call is a whole qualname, so the group's gets what stands before the relative one.
    qualname = layers[0].call
    prefix = qualname.removesuffix(relative(qualname, block))
    return Node(
        name=name_of[group],
        call=f"{prefix}{group} ({len(layers)})",
        is_module=True,
        reads=tuple(reads),
        is_path=any(node.is_path for node in own),
    )


def _in_order(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Return nodes with each behind those that it reads; none if they read each other."""
    waiting = {node.name: node for node in nodes}
    ordered: list[Node] = []
    while waiting:
        ready = [node for node in waiting.values() if waiting.keys().isdisjoint(node.reads)]
        if not ready:
            return ()
        # Only the first one: a node that waited for it alone comes next, before the other ready
        # ones, as in the order of the graph.
        ordered.append(waiting.pop(ready[0].name))
    return tuple(ordered)
