"""Make each block keep less for its backward pass, without changing a value or a gradient.

1. A ReLU that only feeds a max pool moves behind it. The two commute, and the ReLU then keeps the
   small output of the pool.
2. A `torch.nn.MaxPool2d` becomes a `MemorySavingMaxPool2d`, which keeps its indices but not its
   input.
3. A layer takes over the norm, the activation and the dropout before it, where no other node reads
   them. The call of `recomputed` computes their values again in the backward pass.
4. Self-attention that keeps a copy of its input becomes `self_attention`, which does not. It takes
   over the layer norm before it.
5. An activation that only feeds one layer, or whose value only leaves the block and so feeds a
   head, becomes its memory-saving twin. In a block-local step the backward pass of the twin writes
   over the gradient that the layer or the head made for it.

No rewrite touches an operation whose in-place write is read by another name
(`BlockFacts.read_behind`). None moves a read of a value behind a later write on it, and none keeps
a value for the backward pass that is written on later.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from sffx.compiler.facts import block_facts
from sffx.compiler.inplace import may_return_input
from sffx.compiler.qualnames import called_module, holders
from sffx.kernels.activation import MEMORY_SAVING, NAMES, MemorySavingGELU
from sffx.kernels.attention import self_attention
from sffx.kernels.chain import BATCH_NORMS, CONVOLUTIONS
from sffx.kernels.pool import MemorySavingMaxPool2d
from sffx.kernels.recompute import is_plain, recomputed
from sffx.net import plan_of

_MONOTONE = (nn.ReLU, nn.ReLU6, F.relu, torch.relu, F.relu6)

# Kinds of nodes that a layer takes over, from the layer back to its input. The keys are arguments
# of `recomputed`.
_TAKEN_OVER: dict[str, tuple[Any, ...]] = {
    "dropout": (nn.Dropout,),
    "activation": tuple(NAMES),
    "norm": (*BATCH_NORMS, nn.LayerNorm),
}

# Layers whose backward pass does not read their output.
_DO_NOT_READ_OUTPUT = (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear, recomputed)

# Layers whose backward pass makes a new tensor for the gradient of their input. Exact classes: a
# subclass may hand through the tensor that it was given.
_MAKE_NEW_GRADIENT = (*_DO_NOT_READ_OUTPUT, MemorySavingMaxPool2d)


def save_memory(net: GraphModule) -> None:
    """Rewrite the blocks of a cut model, in place. The plan says which of them recompute."""
    plan = plan_of(net)
    # A head of the user's own may hand on a gradient that it holds as well.
    is_built_in = not callable(plan.options.goodness)
    for block in plan.all_blocks:
        module = net.get_submodule(block.target)
        assert isinstance(module, GraphModule)
        feeds_head = is_built_in and block is not plan.classifier
        recompute = plan.options.recompute and plan.is_large(block)
        save_memory_in(module, feeds_head=feeds_head, recompute=recompute)


def save_memory_in(block: GraphModule, *, feeds_head: bool, recompute: bool) -> None:
    """Rewrite one block, in place; its graph must be valid and stays so.

    Args:
        block: the block.
        feeds_head: whether a head reads its output, which alone makes a gradient for it.
        recompute: whether to compute cheap values again rather than keep them (3, and the norm
            of 4).
    """
    # First, so that a layer behind the pool can take over the ReLU.
    for node in list(block.graph.nodes):
        if _is_max_pool(block, node):
            _move_relu_behind(block, node)
            _replace_max_pool(block, node)
    # A rewrite of attention also erases nodes that this list still holds: those that pick an item
    # of its result. No rewrite applies to such a node.
    for node in list(block.graph.nodes):
        if recompute and _can_recompute(block, node):
            _take_over(block, node)
        if _is_self_attention(block, node):
            _replace_self_attention(block, node, recompute=recompute)
    _free_gradients(block)
    for node in list(block.graph.nodes):
        if _can_write_over_gradient(block, node, feeds_head):
            _replace_activation(block, node)
    _delete_unused(block)
    block.graph.lint()
    block.recompile()


# What a node is


def _module(block: GraphModule, node: Node) -> Any:
    return called_module(node, block)


def _kind(block: GraphModule, node: Node) -> Any:
    """Return the class of the module that a node calls, or the function.

    It is None where there is neither. It is None for a module with hooks as well, which may compute
    something else than its class does.
    """
    module = _module(block, node)
    if module is not None:
        return type(module) if is_plain(module) else None
    return node.target if node.op == "call_function" else None


def _reads_one(node: Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], Node)


def _has_one_reader(node: Node) -> bool:
    """Return whether one node reads a value, and none reads a write of its node by another name."""
    return len(node.users) == 1 and not block_facts(node).read_behind


def _is_link(node: Node) -> bool:
    """Return whether a node stands between one value and one reader."""
    return _reads_one(node) and _has_one_reader(node)


def _is_input_written_later(first: Node, merged: list[Node]) -> bool:
    """Return whether the value that a node reads is written in place after the node.

    Writes by the nodes that it is merged with do not count.
    """
    return _is_written_later(_source(first), first, merged)


def _is_written_later(value: Node, place: Node, merged: list[Node]) -> bool:
    """Return whether a value is written in place after a place, but by one of some nodes."""
    memory = block_facts(value).memory
    later = place.next
    while later.op != "output":
        is_write = memory in block_facts(later).writes
        if is_write and later not in merged:
            return True
        later = later.next
    return False


def _source(node: Node) -> Node:
    """Return the node whose value a node reads as its first argument."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _has_other_readers(block: GraphModule, node: Node) -> bool:
    """Return whether another node reads the memory that a node reads, at least in some modes.

    Dropout returns its input in eval mode. So what another node reads may lie before the dropout.
    """
    value = _source(node)
    while len(value.users) == 1:
        if not _reads_one(value) or not may_return_input(block, value, _source(value)):
            return False
        value = _source(value)
    return True


def _writes_input(block: GraphModule, node: Node) -> bool:
    """Return whether an activation writes over its input."""
    module = _module(block, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if len(node.args) > 1:
        return bool(node.args[1])
    return bool(node.kwargs.get("inplace", False))


def _is_approximate(block: GraphModule, node: Node) -> bool:
    """Return whether an activation is a GELU in its approximate form."""
    return getattr(_module(block, node), "approximate", "none") != "none"


# 1 and 2: max pools


def _is_max_pool(block: GraphModule, node: Node) -> bool:
    """Return whether a node is a max pool that returns no indices, for which there is a twin."""
    is_pool = _kind(block, node) is nn.MaxPool2d and _reads_one(node)
    return is_pool and not _module(block, node).return_indices


def _move_relu_behind(block: GraphModule, pool: Node) -> None:
    """Move a ReLU before a max pool behind it, unless other code reads or writes a value there."""
    relu = _source(pool)
    is_monotone = _kind(block, relu) in _MONOTONE
    if not is_monotone or not _is_link(relu) or _is_input_written_later(relu, [relu]):
        return
    if _writes_input(block, relu) and _has_other_readers(block, relu):
        return
    # Behind the pool, the ReLU keeps what takes the place of the pool's value.
    if _is_written_later(pool, pool, []):
        return
    with block.graph.inserting_after(pool):
        moved = block.graph.node_copy(relu, lambda node: node)
    pool.replace_all_uses_with(moved)
    # Only now, or the line above would make the ReLU read itself.
    moved.args = (pool, *relu.args[1:])
    pool.replace_input_with(relu, _source(relu))
    block.graph.erase_node(relu)


def _replace_max_pool(block: GraphModule, node: Node) -> None:
    pool = _module(block, node)
    twin = MemorySavingMaxPool2d(
        pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode
    )
    owner, _, name = str(node.target).rpartition(".")
    setattr(block.get_submodule(owner), name, twin.train(pool.training))


# 3: layers that take over the nodes before them


def _can_recompute(block: GraphModule, node: Node) -> bool:
    """Return whether a node is a layer whose gradients `recomputed` can compute."""
    kind = _kind(block, node)
    if not _reads_one(node) or node.kwargs:
        return False
    if kind is nn.Linear:
        return True
    if kind not in CONVOLUTIONS:
        return False
    layer = _module(block, node)
    is_padding_by_numbers = not isinstance(layer.padding, str)
    return layer.padding_mode == "zeros" and is_padding_by_numbers


def _take_over(block: GraphModule, layer: Node) -> None:
    """Replace a layer and the nodes before it by one call of `recomputed`."""
    taken = _nodes_before(block, layer)
    if not _may_take_over(block, layer, taken):
        return
    merged = [layer, *taken.values()]
    source = _source(merged[-1])
    graph = block.graph
    with graph.inserting_before(layer):
        options: dict[str, Any] = {}
        for name, node in taken.items():
            if name != "activation":
                options[name] = graph.get_attr(str(node.target))
        if "activation" in taken:
            kind = _kind(block, taken["activation"])
            options["activation"] = NAMES[kind]
        if "norm" not in taken and _may_overwrite(block, source):
            options["overwrite"] = True
        layer_module = graph.get_attr(str(layer.target))
        call = graph.call_function(recomputed, (source, layer_module), options)
    call.meta = _meta_of_call(layer)
    layer.replace_all_uses_with(call)
    for node in merged:  # from the last one back, since a node with users cannot be erased
        graph.erase_node(node)


def _nodes_before(block: GraphModule, layer: Node) -> dict[str, Node]:
    """Return the dropout, the activation and the norm before a layer, those of them that are there.

    They are in this order, from the layer back.
    """
    taken: dict[str, Node] = {}
    reader = layer
    for name, kinds in _TAKEN_OVER.items():
        node = _source(reader)
        if _kind(block, node) in kinds and _is_link(node):
            taken[name] = node
            reader = node
    return taken


def _may_take_over(block: GraphModule, layer: Node, taken: dict[str, Node]) -> bool:
    """Return whether a layer can take over some nodes, which `_nodes_before` has found."""
    if "activation" not in taken and "norm" not in taken:
        return False
    if "activation" in taken and _is_approximate(block, taken["activation"]):
        return False
    merged = [layer, *taken.values()]
    first = merged[-1]
    if _writes_input(block, first) and _has_other_readers(block, first):
        return False
    return not _is_input_written_later(first, merged)


def _may_overwrite(block: GraphModule, source: Node) -> bool:
    """Return whether nobody but its one reader needs a value, in the backward pass as well."""
    return _kind(block, source) in _DO_NOT_READ_OUTPUT and _has_one_reader(source)


def _meta_of_call(node: Node) -> dict[str, Any]:
    # fx traces into a function when it reads the graph's code again, unless it is "wrapped".
    return {**node.meta, "is_wrapped": True}


def _free_gradients(block: GraphModule) -> None:
    """Let each call of `recomputed` whose only reader is another one free its gradient early."""
    for node in block.graph.nodes:
        if node.target is recomputed and _has_one_reader(node):
            (reader,) = node.users
            if reader.target is recomputed:
                node.kwargs = {**node.kwargs, "frees_gradient": True}


# 4: self-attention


def _is_self_attention(block: GraphModule, node: Node) -> bool:
    """Return whether a node is attention of a value to itself whose weights nobody reads."""
    if _kind(block, node) is not nn.MultiheadAttention:
        return False
    if len(node.args) != 3 or len(set(node.args)) != 1:
        return False
    given = {key: value for key, value in node.kwargs.items() if value is not None}
    if given != {"need_weights": False}:
        return False
    for user in node.users:
        # Attention returns a pair of its output and its weights.
        reads_output = user.target is operator.getitem and user.args[1] == 0
        if not reads_output:
            return False
    # torch's attention lets its input and its output be written on: it keeps a copy of the input,
    # and a layer behind it keeps a copy of the output. With `self_attention` neither is a copy.
    if _is_input_written_later(node, [node]):
        return False
    if any(_is_written_later(item, item, []) for item in node.users):
        return False
    return _has_plain_projection(_module(block, node))


def _has_plain_projection(attention: Any) -> bool:
    return bool(
        attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def _replace_self_attention(block: GraphModule, node: Node, *, recompute: bool) -> None:
    graph = block.graph
    source = _source(node)
    norm = source if recompute and _is_norm_to_take_over(block, source) else None
    with graph.inserting_before(node):
        options: dict[str, Any] = {}
        if norm is not None:
            options["norm"] = graph.get_attr(str(norm.target))
            source = _source(norm)
        attention = graph.get_attr(str(node.target))
        call = graph.call_function(self_attention, (source, attention), options)
    call.meta = _meta_of_call(node)
    for item in list(node.users):
        item.replace_all_uses_with(call)
        graph.erase_node(item)
    graph.erase_node(node)
    if norm is not None:
        graph.erase_node(norm)


def _is_norm_to_take_over(block: GraphModule, node: Node) -> bool:
    is_norm = _kind(block, node) is nn.LayerNorm and _is_link(node)
    return is_norm and not _is_input_written_later(node, [node])


# 5: activations that write over a gradient


def _can_write_over_gradient(block: GraphModule, node: Node, feeds_head: bool) -> bool:
    if _kind(block, node) not in MEMORY_SAVING or _is_approximate(block, node):
        return False
    return _has_new_gradient(block, node, feeds_head)


def _has_new_gradient(block: GraphModule, node: Node, feeds_head: bool) -> bool:
    """Return whether the gradient of a value is a new tensor, which nobody else holds."""
    if not _is_link(node):
        return False
    (reader,) = node.users
    kind = _kind(block, reader)
    if kind is nn.Dropout:
        # It makes a new gradient, or with p = 0 it passes on that of its reader.
        return _has_new_gradient(block, reader, feeds_head)
    if reader.op == "output":
        # A side value is read by other blocks as well.
        return feeds_head and reader.args[0] is node
    return kind in _MAKE_NEW_GRADIENT


def _replace_activation(block: GraphModule, node: Node) -> None:
    kind = MEMORY_SAVING[_kind(block, node)]
    twin = kind() if kind is MemorySavingGELU else kind(inplace=_writes_input(block, node))
    name = f"{node.name}_saving"
    block.add_module(name, twin.train(block.training))
    with block.graph.inserting_before(node):
        call = block.graph.create_node("call_module", name, (node.args[0],), name=name)
    call.meta = node.meta
    node.replace_all_uses_with(call)
    block.graph.erase_node(node)


def _delete_unused(block: GraphModule) -> None:
    """Delete the modules that the graph does not use.

    torch's own `delete_all_unused_submodules` deletes children of modules that the graph hands to
    functions.
    """
    used: set[str] = set()
    around_used: set[str] = set()
    for node in block.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            used.add(target)
            around_used.update(holders(target))
    names = [name for name, _ in block.named_modules() if name]
    for name in names:
        is_inside_used = not used.isdisjoint(holders(name))
        if name not in used and name not in around_used and not is_inside_used:
            block.delete_submodule(name)
