"""What is inside a block: its nodes or its modules, and which of them reads which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sffx.blocks import Block, Node
from sffx.draw.fold import first_of, relative

JOIN_SIGNS = {"sum": "+", "product": "×", "cat": "cat"}


@dataclass(frozen=True)
class Part:
    """A node as it is drawn, with what it reads among those that are drawn.

    Attributes:
        node: its `reads` name other parts, or values from outside the block.
        text: what is written in it.
    """

    node: Node
    text: str


def parts(block: Block, detail: str) -> list[Part]:
    """The parts of a block, in the order they run.

    Args:
        block: of a plan; of a run of blocks the first is taken.
        detail: "nodes" for all nodes, or "modules" for calls of modules, joins and what leaves the block, where what lies between two of
            these is left out and its edges are drawn through.

    Returns:
        the parts; a plan that does not hold the nodes of the block gives one part for all of it.
    """
    block = first_of(block)
    nodes = block.graph or (Node(block.output, block.name, False, block.inputs),)
    if detail == "modules":
        nodes = _contracted(block, nodes)
    return [Part(node, _text(node, block, detail)) for node in nodes]


def _contracted(block: Block, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    ends = {block.output, *block.sides}
    kept = {node.name for node in nodes if node.is_module or node.join or node.name in ends}
    known = {node.name: node for node in nodes}
    seen_through: dict[str, tuple[str, ...]] = {}
    for node in nodes:  # what a node reads is there before it
        reads = [
            name for read in node.reads for name in _seen(read, node, known, kept, seen_through)
        ]
        seen_through[node.name] = tuple(dict.fromkeys(reads))
    return tuple(
        replace(node, reads=seen_through[node.name]) for node in nodes if node.name in kept
    )


def _seen(
    read: str,
    reader: Node,
    known: dict[str, Node],
    kept: set[str],
    through: dict[str, tuple[str, ...]],
) -> Iterator[str]:
    """What is read where a value is: itself if it is drawn or from outside, else what it is made of.

    What a path is made of besides paths, sizes and masks, is left out.
    """
    if read in kept or read not in known:
        yield read
    elif known[read].is_path or not reader.is_path:
        yield from through[read]


def _text(node: Node, block: Block, detail: str) -> str:
    called = JOIN_SIGNS.get(node.join, relative(node.call, block) if node.is_module else node.call)
    if detail == "modules" or called == node.name:
        return called
    # fx makes most names of what is called, in small letters.
    return (
        node.name if called.replace(".", "_").lower() in node.name else f"{called}   ({node.name})"
    )


def joins_in_words(block: Block) -> str:
    """The places inside a block where paths meet: "+ shortcut ×2 · × gate", "4 paths joined (cat)"; "" where there are none."""
    counts: dict[str, int] = {}
    for node in block.joins:
        if node.join != "cat" and node.join in JOIN_SIGNS:
            counts[_join(node)] = counts.get(_join(node), 0) + 1
    told = [text + (f" ×{number}" if number > 1 else "") for text, number in counts.items()]
    return " · ".join(
        [*told, *_concatenations([len(node.paths) for node in block.joins if node.join == "cat"])]
    )


def _join(node: Node) -> str:
    shortest, longest = min(node.paths), max(node.paths)
    if node.join == "product":
        return "× gate" if not shortest else f"{len(node.paths)} paths multiplied"
    if shortest == longest:
        return f"{len(node.paths)} paths summed"
    return (
        "+ shortcut"
        if not shortest
        else f"+ shortcut through {'a layer' if shortest == 1 else f'{shortest} layers'}"
    )


def _concatenations(widths: list[int]) -> list[str]:
    if not widths:
        return []
    low, high = min(widths), max(widths)
    spread = f"{low}" if low == high else f"{low} to {high}"
    return [f"{spread} paths joined (cat)" + (f" ×{len(widths)}" if len(widths) > 1 else "")]
