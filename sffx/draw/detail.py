"""The inside of a block: its modules or its nodes, and which of them reads which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sffx.blocks import Block, Node
from sffx.draw.fold import first_of, relative
from sffx.draw.group import grouped

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
            leave the block. The edges of a node that is left out are drawn through. Where these are
            many, the layers of one module are one part.

    Returns:
        The parts; one for the whole block if the plan does not hold its nodes.
    """
    block = first_of(block)
    # Where the plan does not hold them, one node stands for the whole block.
    nodes = block.graph
    if not nodes:
        nodes = (Node(block.output, block.name, is_module=False, reads=block.inputs),)
    if detail == "modules":
        nodes = grouped(block, _without_functions(block, nodes))
    return [Part(node, _text(node, block, detail)) for node in nodes]


def functional_modules(block: Block) -> dict[str, str]:
    """Return the modules that compute by functions, by the last node that reads their parameters.

    The window attention of a Swin transformer is an example: none of its layers is called, but one
    function takes their weights. A module with a layer that is called is none of these.
    """
    silent = _modules_without_calls(block)
    found = {}
    for module, reader in _last_readers(silent, block).items():
        # Of a module and the layers inside it, the module is named.
        if not any(_lies_in(module, other) for other in silent):
            found[reader] = module
    return found


def _modules_without_calls(block: Block) -> set[str]:
    """Return the modules whose parameters a node takes, and of which no layer is called."""
    owners = set()
    for node in block.graph:
        # The call of such a node is the name of a parameter: "attn.qkv.weight".
        is_parameter = not node.is_module and node.call in block.parameters
        owner = node.call.rpartition(".")[0]
        if is_parameter and owner:
            owners.add(owner)
    return {owner for owner in owners if not _holds_any(owner, block.modules)}


def _last_readers(modules: set[str], block: Block) -> dict[str, str]:
    """Return the last node on a path that reads a parameter of each module, by the module.

    A parameter may go through nodes that are on no path before a path reads it: a transpose of a
    weight, or a mask that is looked up in a table.
    """
    # The modules whose parameters are in the value of a node.
    owners_of: dict[str, set[str]] = {}
    last_reader: dict[str, str] = {}
    for node in block.graph:
        owners = set()
        if not node.is_module:
            owners = {module for module in modules if _lies_in(node.call, module)}
        for read in node.reads:
            owners |= owners_of.get(read, set())
        if not node.is_path:
            owners_of[node.name] = owners
            continue
        # A later node takes the place of an earlier one.
        for owner in owners:
            last_reader[owner] = node.name
    return last_reader


def module_names(block: Block) -> list[str]:
    """Return the modules that a block runs, in order, those that compute by functions as well."""
    by_function = functional_modules(block)
    if not by_function:
        return list(block.modules)
    names = []
    for node in block.graph:
        if node.is_module:
            names.append(node.call)
        elif node.name in by_function:
            names.append(by_function[node.name])
    return names


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
    by_function = functional_modules(block)
    # A module that computes by functions is shown by the last of these.
    named = []
    for node in nodes:
        if node.name in by_function:
            node = replace(node, call=by_function[node.name], is_module=True)
        named.append(node)
    shown = set()
    for node in named:
        if node.is_module or node.join or node.name in leaving:
            shown.add(node.name)
    reads = _drawn_reads(named, shown)
    return tuple(replace(node, reads=reads[node.name]) for node in named if node.name in shown)


def _drawn_reads(nodes: Sequence[Node], shown: set[str]) -> dict[str, tuple[str, ...]]:
    """Return what each node reads, where the reads of a node that is not shown stand for it."""
    by_name = {node.name: node for node in nodes}
    reads: dict[str, tuple[str, ...]] = {}
    # A node comes after all that it reads, so the reads of those are complete by then.
    for node in nodes:
        # A dict has each of them once, in order.
        sources: dict[str, None] = {}
        for read in node.reads:
            source = by_name.get(read)
            if source is None or read in shown:  # from outside, or drawn
                sources[read] = None
                continue
            # A path that reads a size or a mask has no edge from what these were computed of.
            is_aside = node.is_path and not source.is_path
            if not is_aside:
                sources.update(dict.fromkeys(reads[read]))
        reads[node.name] = tuple(sources)
    return reads


def _lies_in(name: str, module: str) -> bool:
    # With a dot, because "layer10" does not lie in "layer1".
    return name.startswith(f"{module}.")


def _holds_any(module: str, names: Sequence[str]) -> bool:
    return any(name == module or _lies_in(name, module) for name in names)


def _text(node: Node, block: Block, detail: str) -> str:
    """Return what is written in a node: what it calls, and its name where that says more."""
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
