"""No write in place crosses a cut.

A value that crosses a cut is read by the head of the block that computed it. So no later block may
write over it. This pass looks for such writes in each block. It turns the operation into its twin
that leaves its input alone:

1. a module with `inplace=True` becomes a copy with `inplace=False`,
2. a function called with `inplace=True` is called with False,
3. an in-place operator (`+=`) becomes the plain one (`+`),
4. a method or a torch function `name_` becomes `name`.

A twin does not help in two cases. There the value is copied where the block begins, and the
operation writes on the copy:

- it writes in some modes only, and the value is read afterwards,
- the model reads by another name what was written, as `h` after a write on the view `h[:, 0]`.

Two operations are refused: one that has no twin, and one that writes what a later block reads by a
name from before this block. That name would keep the old value.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sffx.compiler.facts import block_facts, set_block_facts
from sffx.compiler.qualnames import called_module, name_of_call, name_of_target
from sffx.compiler.trace.effects import set_item, set_item_of_copy
from sffx.compiler.trace.run_function import RunFunction
from sffx.errors import CutError
from sffx.net import plan_of

_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.imatmul: operator.matmul,
    operator.ipow: operator.pow,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    set_item: set_item_of_copy,
}

# These return their input in eval mode.
_BY_MODE = ("dropout", "alpha_dropout", "alphadropout", "feature_", "featurealphadropout")
# And these return it, or a view of it, in some layouts that the trace did not see. A norm lays out
# its result in order, which makes a view of what was a copy.
_MAYBE_VIEWS = (*_BY_MODE, "flatten", "reshape", "contiguous", "identity")


def keep_foreign_values(net: GraphModule) -> None:
    """Rewrite the blocks of a cut model, in place, so that none writes on another one's values.

    Raises:
        CutError: an operation writes on such a value, and cannot be replaced; names the node.
    """
    # What the blocks behind this one read of other blocks: the memory of each value by its name.
    memory_of: dict[str, int | None] = {}
    for block in reversed(plan_of(net).all_blocks):
        module = net.get_submodule(block.target)
        assert isinstance(module, GraphModule)
        # Only values from before this block. What it computes itself, it may write on.
        read_later = {memory for name, memory in memory_of.items() if name not in block.nodes}
        # Before the rewrite, which may put copies in the place of foreign values.
        foreign = [block_facts(node) for node in module.graph.nodes if _is_foreign(node)]
        keep_foreign_values_in(module, read_later)
        for record in foreign:
            memory_of[record.origin] = record.memory


def keep_foreign_values_in(block: GraphModule, read_later: Collection[int | None] = ()) -> None:
    """Rewrite one block, in place; its graph must be valid and stays so.

    Args:
        block: to rewrite.
        read_later: the memory of the values that later blocks read from before this block.
    """
    foreign = {node for node in block.graph.nodes if _is_foreign(node)}
    copied = _written_in_some_mode(block, foreign, read_later)
    copied += _read_by_other_names(block, foreign, read_later)
    for node in dict.fromkeys(copied):
        _copy_at_entrance(node)
        foreign.remove(node)
    memories = {block_facts(node).memory for node in foreign}
    replaced: dict[str, nn.Module] = {}
    for node in block.graph.nodes:
        # From here on, `foreign` also has what may be a foreign value or a view of one.
        if _may_be_foreign(block, node, foreign):
            foreign.add(node)
        record = block_facts(node)
        writes_foreign = not memories.isdisjoint(record.writes)
        may_write_foreign = any(arg in foreign for arg in _written(node))
        if writes_foreign or (may_write_foreign and not record.read_behind):
            _replace(block, node, replaced)
    for target, twin in replaced.items():
        owner, _, name = target.rpartition(".")
        setattr(block.get_submodule(owner), name, twin)
    block.graph.lint()
    block.recompile()


def _written_in_some_mode(
    block: GraphModule, foreign: set[Node], read_later: Collection[int | None]
) -> list[Node]:
    """Return foreign values that are written in some modes only, and read afterwards.

    `y = relu_(dropout(x)); y + x` is an example. In eval mode dropout returns x itself, and the sum
    reads what the ReLU has written. In train mode it reads x as it was. An operation that is not in
    place would be right in one mode only.

    Raises:
        CutError: a later block reads such a value. It would need what this block wrote in one mode,
            and what was there before in the other.
    """
    order = {node: i for i, node in enumerate(block.graph.nodes)}
    found: dict[Node, None] = {}
    for node in block.graph.nodes:
        for written in _written(node):
            # Back to the value that the written one is in some modes.
            source = written
            passes_dropout = False
            while source not in foreign and _passes_on(block, source):
                name = name_of_call(source, block).lower()
                passes_dropout = passes_dropout or name.startswith(_BY_MODE)
                source = source.all_input_nodes[0]
            # What is written in every mode is replaced, or copied by another rule.
            if source is written or source not in foreign:
                continue
            if passes_dropout and block_facts(source).memory in read_later:
                raise CutError(_written_in_one_mode(node, source))
            if any(order[user] > order[node] for user in source.users):
                found[source] = None
    return list(found)


def _written_in_one_mode(node: Node, value: Node) -> str:
    return (
        f"node {block_facts(node).origin!r} writes in place on the value "
        f"{block_facts(value).origin!r} in one mode only, as behind dropout, and another block "
        "reads that value afterwards. Hint: cut elsewhere, so that one block holds both, or write "
        "the model without this in-place operation"
    )


def _is_foreign(node: Node) -> bool:
    """Return whether another block computed a value."""
    return block_facts(node).is_foreign


def _read_by_other_names(
    block: GraphModule, foreign: set[Node], read_later: Collection[int | None]
) -> list[Node]:
    """Return foreign values that are written in place, and then read by another name.

    Left out are those that no copy helps: two values of the block share the memory, or a later
    block reads it from before this block. They would still see what was there before.

    Args:
        block: to look at.
        foreign: its values that other blocks computed.
        read_later: see `keep_foreign_values_in`.
    """
    found: dict[Node, None] = {}
    for node in block.graph.nodes:
        record = block_facts(node)
        if not record.read_behind or not record.writes.isdisjoint(read_later):
            continue
        for memory in record.writes:
            sources = [each for each in foreign if block_facts(each).memory == memory]
            if len(sources) == 1:
                found[sources[0]] = None
    return list(found)


def _passes_on(block: GraphModule, node: Node) -> bool:
    """Return whether a node returns its first input in some modes, but not in that of the trace."""
    if not node.all_input_nodes:
        return False
    source = node.all_input_nodes[0]
    is_view = block_facts(node).memory == block_facts(source).memory
    return not is_view and may_return_input(block, node, source)


def _copy_at_entrance(value: Node) -> None:
    """Let the block work on a copy of a value of another block, on which it may write."""
    last = value
    # All placeholders of a graph come before its other nodes.
    while last.next.op == "placeholder":
        last = last.next
    with value.graph.inserting_after(last):
        copied = value.graph.call_method("clone", (value,))
    set_block_facts(copied, replace(block_facts(value), is_foreign=False))
    value.replace_all_uses_with(copied, lambda user: user is not copied)


def _may_be_foreign(block: GraphModule, node: Node, foreign: set[Node]) -> bool:
    """Return whether a node returns a foreign value or a view of it, at least in some modes."""
    source = next(iter(node.all_input_nodes), None)
    if source not in foreign or node.op == "output":
        return False
    return may_return_input(block, node, source)


def may_return_input(block: GraphModule, node: Node, source: Node) -> bool:
    """Return whether a node returns what it reads, or a view of it, at least in some modes."""
    memory = block_facts(node).memory
    is_view = memory is not None and memory == block_facts(source).memory
    return is_view or name_of_call(node, block).lower().startswith(_MAYBE_VIEWS)


def _written(node: Node) -> list[Node]:
    """Return the arguments that a node writes in place."""
    writes = block_facts(node).writes
    return [arg for arg in node.all_input_nodes if block_facts(arg).memory in writes]


def _replace(block: GraphModule, node: Node, replaced: dict[str, nn.Module]) -> None:
    """Turn an in-place operation into its twin that leaves its input alone.

    Args:
        block: the block.
        node: the operation.
        replaced: the modules to put in the place of the block's own; may get another.
    """
    name = block_facts(node).origin
    if block_facts(node).read_behind:
        raise CutError(
            f"node {name!r} writes in place on a value that crosses a cut, and the model reads "
            "what it wrote by another name. Hint: cut elsewhere, or use the operation's result "
            "instead of the variable that it writes to"
        )
    target = node.target
    module: Any = called_module(node, block)
    if getattr(module, "inplace", False):
        twin = copy.copy(module)
        twin.inplace = False
        replaced[str(target)] = twin
    elif isinstance(module, RunFunction) and _plain(module.function) is not None:
        run_plain = RunFunction(_plain(module.function), module.mode)
        replaced[str(target)] = run_plain.train(module.training)
    elif _has_inplace(target):
        _call_with_inplace_false(node)
    elif _plain(target) is not None:
        node.target = _plain(target)
    else:
        raise CutError(
            f"node {name!r} writes in place on a value that crosses a cut, and {target} has no "
            "form that does not. Hint: cut elsewhere, or write the model without this in-place "
            "operation"
        )


def _plain(target: Any) -> Any:
    """Return the form of a function or a method that leaves its input alone, None if none does."""
    if target in _OUT_OF_PLACE:
        return _OUT_OF_PLACE[target]
    return _without_underscore(target)


def _has_inplace(target: object) -> bool:
    try:
        return callable(target) and "inplace" in inspect.signature(target).parameters
    except (ValueError, TypeError):  # some functions written in C have no signature
        return False


def _call_with_inplace_false(node: Node) -> None:
    assert callable(node.target)
    place = list(inspect.signature(node.target).parameters).index("inplace")
    if len(node.args) > place:
        node.args = (*node.args[:place], False, *node.args[place + 1 :])
    else:
        node.kwargs = {**node.kwargs, "inplace": False}


def _without_underscore(target: object) -> str | Callable[..., object] | None:
    """Return the method or torch function whose name lacks the trailing underscore, if any.

    A method is returned as its name: "add" for "add_".
    """
    name = name_of_target(target)
    if not name.endswith("_") or name.endswith("__"):  # __iadd__ is no such name
        return None
    plain_name = name[:-1]
    if isinstance(target, str):
        return plain_name if hasattr(Tensor, plain_name) else None
    return getattr(torch, plain_name, None)
