"""Two graphs of one model, side by side: which nodes are the same, and which only one of them has.

Most nodes are the same in train and in eval mode. What a forward does on one side of a branch is a
*region*: a row of nodes that only one of the graphs has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.compiler.facts import facts, module_stack
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.run_function import FunctionTarget, name_of


@dataclass(frozen=True)
class Region:
    """What lies between two nodes that both graphs have.

    Attributes:
        in_train: the nodes that only the graph of train mode has, in order.
        in_eval: the nodes that only the graph of eval mode has.
        end: the node behind it, of the graph of train mode.
    """

    in_train: list[fx.Node]
    in_eval: list[fx.Node]
    end: fx.Node

    @property
    def nodes(self) -> list[fx.Node]:
        return [*self.in_train, *self.in_eval]


@dataclass
class Alignment:
    """Which nodes of two graphs are the same.

    Attributes:
        pairs: nodes that both graphs have, each in train and in eval mode, in order.
        regions: that only one of them has, in order.
        reads: pairs of nodes that read the same parameter or buffer, found in any order. They are
            not among `pairs`.
    """

    pairs: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    reads: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)


def align(
    in_train: Sequence[fx.Node],
    in_eval: Sequence[fx.Node],
    probe: nn.Module,
    *,
    from_behind: bool = False,
) -> Alignment | None:
    """Return which nodes are the same, None if inputs or the output have no partner.

    Args:
        in_train: the nodes of the graph of train mode.
        in_eval: the nodes of the graph of eval mode.
        probe: the model, which owns the constants of both graphs.
        from_behind: whether to match nodes from the end of the graphs. Train mode may update a
            mean by operations that look like those by which both modes use it afterwards. Matched
            from the front, the update would be taken for the use.
    """
    alignment = Alignment()
    if from_behind:
        alignment.reads = _same_reads(in_train, in_eval)
        paired = {node for pair in alignment.reads for node in pair}
        in_train = [node for node in in_train if node not in paired]
        in_eval = [node for node in in_eval if node not in paired]
    # The nodes of a region so far: ours in train mode, theirs in eval mode.
    ours: list[fx.Node] = []
    theirs: list[fx.Node] = []
    for our, their in _rows(in_train, in_eval, from_behind):
        if our is not None and their is not None and _call_the_same(our, their, probe):
            if ours or theirs:
                alignment.regions.append(Region(ours, theirs, our))
                ours, theirs = [], []
            alignment.pairs.append((our, their))
            continue
        if our is not None:
            ours.append(our)
        if their is not None:
            theirs.append(their)
    if ours or theirs or not _are_inside(alignment.regions):
        return None
    return alignment


def _are_inside(regions: Sequence[Region]) -> bool:
    for region in regions:
        if any(node.op in ("placeholder", "output") for node in region.nodes):
            return False
    return True


def _same_reads(
    in_train: Sequence[fx.Node], in_eval: Sequence[fx.Node]
) -> list[tuple[fx.Node, fx.Node]]:
    """Return pairs of nodes that read the same parameter or buffer.

    The one in train mode is the first that reads it.
    """
    first: dict[str, fx.Node] = {}
    for node in filter(_reads_state, in_train):
        first.setdefault(str(node.target), node)
    pairs = []
    for node in filter(_reads_state, in_eval):
        if str(node.target) in first:
            pairs.append((first[str(node.target)], node))
    return pairs


def _reads_state(node: fx.Node) -> bool:
    """Return whether a node reads a parameter or a buffer."""
    return node.op == "get_attr" and not _is_constant(node)


def _is_constant(node: fx.Node) -> bool:
    """Return whether a node reads a constant, which each trace names anew."""
    return node.op == "get_attr" and type(facts(node).example) is Tensor


def _rows(
    in_train: Sequence[fx.Node], in_eval: Sequence[fx.Node], from_behind: bool
) -> Iterator[tuple[fx.Node | None, fx.Node | None]]:
    """Yield what `_side_by_side` yields, matched from the front or from the end of the graphs."""
    if not from_behind:
        yield from _side_by_side(in_train, in_eval)
        return
    from_the_end = list(_side_by_side(in_train[::-1], in_eval[::-1]))
    yield from reversed(from_the_end)


def _side_by_side(
    in_train: Sequence[fx.Node], in_eval: Sequence[fx.Node]
) -> Iterator[tuple[fx.Node | None, fx.Node | None]]:
    """Yield pairs of nodes that look the same, and nodes without a partner, all in order."""
    keys = [_key(node) for node in in_train]
    keys_in_eval = [_key(node) for node in in_eval]
    if keys == keys_in_eval:
        yield from zip(in_train, in_eval, strict=True)
        return
    # By default, difflib leaves out what occurs often, as the layers of a long model do.
    matcher = SequenceMatcher(None, keys, keys_in_eval, autojunk=False)
    passed_in_train = 0
    passed_in_eval = 0
    # The last match has no nodes, and lies behind those of both graphs.
    for match in matcher.get_matching_blocks():
        for node in in_train[passed_in_train : match.a]:
            yield node, None
        for node in in_eval[passed_in_eval : match.b]:
            yield None, node
        passed_in_train = match.a + match.size
        passed_in_eval = match.b + match.size
        same_in_train = in_train[match.a : passed_in_train]
        same_in_eval = in_eval[match.b : passed_in_eval]
        yield from zip(same_in_train, same_in_eval, strict=True)


def _key(node: fx.Node) -> tuple[str, ...]:
    """Return what two nodes have in common that may be the same."""
    scopes = list(module_stack(node))
    place = str(scopes[-1]) if scopes else ""
    if _is_constant(node):
        return (node.op, "constant", place)
    if isinstance(node.target, FunctionTarget):  # numbered in each trace
        return (node.op, f"function {name_of(node.target.function)}", place)
    if node.op == "placeholder":  # inputs are the same by their order
        return (node.op, "", place)
    return (node.op, str(node.target), place)


def _call_the_same(in_train: fx.Node, in_eval: fx.Node, probe: nn.Module) -> bool:
    """Return whether two nodes call the same function or module, or read the same value."""
    if in_train.op != in_eval.op:
        return False
    ours: Any = in_train.target
    theirs: Any = in_eval.target
    if isinstance(ours, FunctionTarget) and isinstance(theirs, FunctionTarget):
        return name_of(ours.function) == name_of(theirs.function)
    if in_train.op == "placeholder" or str(ours) == str(theirs):
        return True
    if in_train.op != "get_attr":
        return False
    # The same constant, made in each trace anew.
    ours = attribute(probe, str(in_train.target))
    theirs = attribute(probe, str(in_eval.target))
    if type(ours) is not Tensor or type(theirs) is not Tensor:
        return False
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
