"""The inside of a block: its modules or its nodes, and which of them reads which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sffx.blocks import Block, Node
from sffx.draw.fold import first_of, relative

DETAILS = ("blocks", "modules", "nodes")

# The kinds of joins that have a sign of their own.
JOIN_SIGNS = {"sum": "+", "product": "×", "cat": "cat"}


@dataclass(frozen=True)
class Part:
    """A node as it is drawn.

    Attributes:
        node: its `reads` name other parts that are drawn, or values from outside the block.
        text: what is written in it.
    """

    node: Node
    text: str


def parts(block: Block, detail: str) -> list[Part]:
    """Return the parts of a block, in the order they run.

    Args:
        block: of a plan. For a run of blocks these are the parts of the first.
        detail: "nodes" for all nodes, or "modules" for calls of modules, joins, and the values that
            leave the block. The edges of a node that is left out are drawn through.

    Returns:
        The parts; one for the whole block if the plan does not hold its nodes.
    """
    block = first_of(block)
    nodes = block.graph or (Node(block.output, block.name, False, block.inputs),)
    if detail == "modules":
        nodes = _without_functions(block, nodes)
    return [Part(node, _text(node, block, detail)) for node in nodes]


def joins_in_words(block: Block) -> str:
    """Return where paths meet inside a block: "+ shortcut ×2 · × gate", "4 paths joined (cat)".

    The text is empty where no paths meet.
    """
    phrases: Counter[str] = Counter()
    widths = []
    for node in block.joins:
        if node.join == "cat":
            widths.append(len(node.paths))
        elif node.join in JOIN_SIGNS:
            phrases[_join_in_words(node)] += 1
    words = [_times(phrase, number) for phrase, number in phrases.items()]
    if widths:
        words.append(_times(_concatenation_in_words(widths), len(widths)))
    return " · ".join(words)


def _without_functions(block: Block, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Return the modules, joins and leaving values among the nodes, with edges drawn through."""
    leaving = {block.output, *block.sides}
    by_name = {node.name: node for node in nodes}
    shown = set()
    for node in nodes:
        if node.is_module or node.join or node.name in leaving:
            shown.add(node.name)

    reads: dict[str, tuple[str, ...]] = {}
    # A node comes after all that it reads, so the reads of those are complete by then.
    for node in nodes:
        sources: dict[str, None] = {}
        for read in node.reads:
            source = by_name.get(read)
            if source is None or read in shown:
                sources[read] = None
            elif source.is_path or not node.is_path:
                sources.update(dict.fromkeys(reads[read]))
            # Else a path reads a size or a mask that is not drawn, which is left out.
        reads[node.name] = tuple(sources)
    return tuple(replace(node, reads=reads[node.name]) for node in nodes if node.name in shown)


def _text(node: Node, block: Block, detail: str) -> str:
    called = relative(node.call, block) if node.is_module else node.call
    called = JOIN_SIGNS.get(node.join, called)
    if detail == "modules" or called == node.name:
        return called
    # fx makes most names from what is called, in small letters; such a name says enough.
    if called.replace(".", "_").lower() in node.name:
        return node.name
    return f"{called}   ({node.name})"


def _join_in_words(node: Node) -> str:
    shortest = min(node.paths)
    longest = max(node.paths)
    if node.join == "product":
        return "× gate" if shortest == 0 else f"{len(node.paths)} paths multiplied"
    if shortest == longest:
        return f"{len(node.paths)} paths summed"
    if shortest == 0:
        return "+ shortcut"
    layers = "a layer" if shortest == 1 else f"{shortest} layers"
    return f"+ shortcut through {layers}"


def _concatenation_in_words(widths: Sequence[int]) -> str:
    low = min(widths)
    high = max(widths)
    if low == high:
        return f"{low} paths joined (cat)"
    return f"{low} to {high} paths joined (cat)"


def _times(phrase: str, number: int) -> str:
    return phrase if number == 1 else f"{phrase} ×{number}"
