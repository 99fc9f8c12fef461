"""The record of each node of a graph: `Facts` in a traced model, `BlockFacts` in a block.

A node keeps its record in `node.meta`, under one key. When fx copies a node it copies `node.meta`,
but not the values in it. So the records are frozen: a node and its copy may share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from sffx.tensors import storage_key, tensors_in

_FACTS = "sffx_facts"
_BLOCK_FACTS = "sffx_block_facts"


@dataclass
class Cost:
    """What one node costs for the first batch of a trace.

    Attributes:
        macs: multiply-adds.
        saved: bytes that autograd keeps for the backward pass, by storage.
        draws: whether it draws random numbers of torch.
    """

    macs: int = 0
    saved: dict[int, int] = field(default_factory=dict)
    draws: bool = False


@dataclass(frozen=True)
class Facts:
    """What the trace found out about one node.

    Attributes:
        example: its value on fake tensors; None for the output node.
        other: its value at another batch size.
        resized: its value at another size of images or another length; None where none is known.
        batch: the batch axis of its value, as `find_batch` returns it.
        of_batch: whether its value is a number, or a tuple of sizes, that the batch changes.
        is_folded: whether its second axis holds instances, which the model folds into the batch.
        cost: of its computation.
        writes: those of its arguments that it writes in place.
        buffers: names of the buffers that it writes, in the module that it calls.
        after: nodes that must run before it, although no argument says so.
        read_behind: whether it is in another node's `after`, which reads by another name what it
            writes.
    """

    example: Any = None
    other: Any = None
    resized: Any = None
    batch: Any = None
    of_batch: bool = False
    is_folded: bool = False
    cost: Cost = field(default_factory=Cost)
    writes: tuple[fx.Node, ...] = ()
    buffers: frozenset[str] = frozenset()
    after: tuple[fx.Node, ...] = ()
    read_behind: bool = False


@dataclass(frozen=True)
class BlockFacts:
    """What the rewrites of a block need to know about one of its nodes.

    Attributes:
        origin: name of the traced node that it stands for; "" for a node that has none. Where a
            rewrite merges several nodes, the last of them.
        memory: key of the storage of its value, which views share; None where it is no tensor.
        writes: keys of the storages that it writes in place.
        read_behind: as in `Facts`.
        is_foreign: whether its value was computed in another block, as that of a placeholder may.
    """

    origin: str = ""
    memory: int | None = None
    writes: frozenset[int] = frozenset()
    read_behind: bool = False
    is_foreign: bool = False


def facts(node: fx.Node) -> Facts:
    """Return the record of a traced node."""
    return node.meta[_FACTS]


def set_facts(node: fx.Node, record: Facts) -> None:
    node.meta[_FACTS] = record


def change_facts(node: fx.Node, **changes: Any) -> None:
    """Give a traced node a new record, which differs in the fields that are named."""
    node.meta[_FACTS] = replace(facts(node), **changes)


def read_instead(reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Let a traced node read a value in the place of another one, and write on it likewise."""
    reader.replace_input_with(old, new)
    writes = [new if written is old else written for written in facts(reader).writes]
    change_facts(reader, writes=tuple(writes))


def storages_written(nodes: Iterable[fx.Node]) -> set[int]:
    """Return the keys of the storages that some traced nodes write in place."""
    keys: set[int] = set()
    for node in nodes:
        for written in facts(node).writes:
            keys.add(storage_key(facts(written).example))
    return keys


def carries_gradient(node: fx.Node) -> bool:
    """Return whether a tensor in the value of a traced node has a gradient."""
    return any(tensor.requires_grad for tensor in tensors_in(facts(node).example))


def module_stack(node: fx.Node) -> dict[str, Any]:
    """Return the modules whose forward created a node, outermost first, as fx records them."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
    return stack


def block_facts(node: fx.Node) -> BlockFacts:
    """Return the record of a node of a block; nodes that a rewrite has added have an empty one."""
    return node.meta.get(_BLOCK_FACTS, BlockFacts())


def set_block_facts(node: fx.Node, record: BlockFacts) -> None:
    node.meta[_BLOCK_FACTS] = record
