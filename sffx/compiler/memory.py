"""Make a block's graph keep less for its backward pass, without changing a value or a gradient.

1. A ReLU that only feeds a max pool moves behind it: the two commute, and what the ReLU keeps shrinks with the pool.
2. A `torch.nn.MaxPool2d` becomes a `LeanMaxPool2d`, which keeps its indices but not its input.
3. A layer takes over the norm and the activation before it, which nothing else reads: their values are computed again for the backward
   pass instead of kept (`recomputed`).
4. Self-attention that keeps a copy of its input becomes `self_attention`, which does not.
5. An activation that only feeds one layer, or only leaves the block and so feeds a head, becomes its lean twin, whose backward pass writes
   over the gradient that the layer or the head made for it, in a block-local step.

An operation whose in-place write is read behind its back (`BlockFacts.read_behind`) is left as it is, and none is moved or made to keep its
input where that is written in place later.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sffx.compiler.facts import block_facts
from sffx.compiler.qualnames import holders
from sffx.kernels.activation import LEAN, NAMES, LeanGELU
from sffx.kernels.attention import self_attention
from sffx.kernels.pool import LeanMaxPool2d
from sffx.kernels.recompute import BATCH_NORMS, CONVOLUTIONS, is_plain, recomputed

_MONOTONE = (nn.ReLU, nn.ReLU6, F.relu, torch.relu, F.relu6)
# Layers whose backward pass makes a tensor of its own for the gradient of its input. Exact classes: a subclass may hand one through.
_FRESH = (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear, LeanMaxPool2d, recomputed)
# Layers whose backward pass does not read their output.
_FORGETFUL = (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear, recomputed)


def lean(block: fx.GraphModule, *, feeds_head: bool, recompute: bool) -> None:
    """Apply the rewrites to a block in place; its graph must be valid and stays so.

    Args:
        block: the block.
        feeds_head: whether its output is read by a head, and by nothing else that gives it a gradient.
        recompute: whether what costs little is computed again rather than kept (3, and the norm of 4).
    """
    for node in list(block.graph.nodes):
        if _is_pool(block, node):
            _commute(block, node)
            _replace_pool(block, str(node.target))
    for node in list(block.graph.nodes):
        if recompute and _is_layer(block, node):
            _take_over(block, node)
        if _is_self_attention(block, node):
            _replace_attention(block, node, recompute=recompute)
    for node in block.graph.nodes:
        if node.target is recomputed and _feeds_recomputed(node):
            node.kwargs = {**node.kwargs, "frees_gradient": True}
    for node in list(block.graph.nodes):
        if _kind(block, node) in LEAN and _has_gradient_of_its_own(block, node, feeds_head):
            _replace_activation(block, node)
    _delete_unused(block)
    block.graph.lint()
    block.recompile()


def _delete_unused(block: fx.GraphModule) -> None:
    """Delete the modules that the graph has no use for; torch's own way takes the children from those that it passes to functions."""
    used = {
        str(node.target) for node in block.graph.nodes if node.op in ("call_module", "get_attr")
    }
    needed = used | {holder for target in used for holder in holders(target)}
    names = [name for name, _ in block.named_modules() if name]
    for name in [n for n in names if n not in needed and used.isdisjoint(holders(n))]:
        block.delete_submodule(name)


def _module(block: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def _kind(block: fx.GraphModule, node: fx.Node) -> Any:
    """Return the class of the module that a node calls, or the function; None where the module is more than its class."""
    module = _module(block, node)
    if module is None:
        return node.target if node.op == "call_function" else None
    return type(module) if is_plain(module) else None


def _is_pool(block: fx.GraphModule, node: fx.Node) -> bool:
    pool: Any = _module(block, node)
    return _kind(block, node) is nn.MaxPool2d and not pool.return_indices and _reads_one(node)


def _commute(block: fx.GraphModule, pool: fx.Node) -> None:
    relu = pool.args[0]
    if (
        not isinstance(relu, fx.Node)
        or _kind(block, relu) not in _MONOTONE
        or not _is_link(relu)
        or _is_written_later(relu, [relu])
    ):
        return
    with block.graph.inserting_after(pool):
        moved = block.graph.node_copy(relu, lambda node: node)
    pool.replace_all_uses_with(moved)
    moved.args = (pool, *relu.args[1:])
    pool.replace_input_with(relu, relu.args[0])  # type: ignore[arg-type]
    block.graph.erase_node(relu)


def _reads_one(node: fx.Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], fx.Node)


def _has_one_reader(node: fx.Node) -> bool:
    """Whether one node reads a value, and none what the node writes in place by another name."""
    return len(node.users) == 1 and not block_facts(node).read_behind


def _is_link(node: fx.Node) -> bool:
    """Whether a node stands between one value and one reader."""
    return _reads_one(node) and _has_one_reader(node)


def _is_written_later(first: fx.Node, merged: list[fx.Node]) -> bool:
    """Whether what a node reads is written in place from there on, by others than the nodes that it is merged with."""
    memory = block_facts(first.args[0]).memory  # type: ignore[arg-type]
    later = first.next
    while later.op != "output":
        if later not in merged and memory in block_facts(later).writes:
            return True
        later = later.next
    return False


def _replace_pool(block: fx.GraphModule, target: str) -> None:
    pool: Any = block.get_submodule(target)
    twin = LeanMaxPool2d(
        pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode
    )
    owner, _, name = target.rpartition(".")
    setattr(block.get_submodule(owner), name, twin.train(pool.training))


def _is_layer(block: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a layer whose gradients `recomputed` knows to compute."""
    kind: Any = _kind(block, node)
    if kind not in (nn.Linear, *CONVOLUTIONS) or not _reads_one(node) or node.kwargs:
        return False
    layer: Any = _module(block, node)
    return kind is nn.Linear or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _take_over(block: fx.GraphModule, layer: fx.Node) -> None:
    """Replace a layer and what comes before it by one call of `recomputed`."""
    found: dict[str, Any] = {}
    spent = [layer]
    for name, kinds in (
        ("dropout", (nn.Dropout,)),
        ("activation", tuple(NAMES)),
        ("norm", (*BATCH_NORMS, nn.LayerNorm)),
    ):
        node: Any = spent[-1].args[0]
        if _kind(block, node) in kinds and _is_link(node):
            found[name] = node
            spent.append(node)
    first: Any = spent[-1]
    if not {"activation", "norm"} & set(found) or (
        _writes(block, first) and len(first.args[0].users) > 1
    ):
        return
    if _is_written_later(first, spent):
        return
    if (
        "activation" in found
        and getattr(_module(block, found["activation"]), "approximate", "none") != "none"
    ):
        return
    source: Any = first.args[0]
    graph = block.graph
    with graph.inserting_before(layer):
        named: dict[str, Any] = {
            name: graph.get_attr(str(node.target))
            for name, node in found.items()
            if name != "activation"
        }
        if "activation" in found:
            named["activation"] = NAMES[_kind(block, found["activation"])]
        if "norm" not in found and _kind(block, source) in _FORGETFUL and _has_one_reader(source):
            named["overwrite"] = True
        call = graph.call_function(recomputed, (source, graph.get_attr(str(layer.target))), named)
    call.meta = {
        **layer.meta,
        "is_wrapped": True,
    }  # fx does not trace into it when it reads the graph's code again
    layer.replace_all_uses_with(call)
    for node in spent:
        graph.erase_node(node)


def _feeds_recomputed(node: fx.Node) -> bool:
    return _has_one_reader(node) and next(iter(node.users)).target is recomputed


def _is_self_attention(block: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is attention of a value to itself whose weights nobody reads."""
    if (
        _kind(block, node) is not nn.MultiheadAttention
        or len(set(node.args)) != 1
        or len(node.args) != 3
    ):
        return False
    if node.kwargs.get("need_weights") is not False or any(
        v is not None for k, v in node.kwargs.items() if k != "need_weights"
    ):
        return False
    attention: Any = _module(block, node)
    plain = (
        attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and not attention.add_zero_attn
    )
    return plain and all(
        user.target is operator.getitem and user.args[1] == 0 for user in node.users
    )


def _replace_attention(block: fx.GraphModule, node: fx.Node, *, recompute: bool) -> None:
    source: Any = node.args[0]
    graph, norm = block.graph, None
    if (
        recompute
        and _kind(block, source) is nn.LayerNorm
        and _is_link(source)
        and not _is_written_later(source, [source])
    ):
        norm, source = source, source.args[0]
    with graph.inserting_before(node):
        named = {"norm": graph.get_attr(str(norm.target))} if norm is not None else {}
        call = graph.call_function(
            self_attention, (source, graph.get_attr(str(node.target))), named
        )  # type: ignore[arg-type]
    call.meta = {**node.meta, "is_wrapped": True}
    for item in list(node.users):
        item.replace_all_uses_with(call)
        graph.erase_node(item)
    graph.erase_node(node)
    if norm is not None:
        graph.erase_node(norm)


def _writes(block: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an activation writes over its input."""
    module = _module(block, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    return bool(node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False))


def _has_gradient_of_its_own(block: fx.GraphModule, node: fx.Node, feeds_head: bool) -> bool:
    if not _is_link(node):
        return False
    (reader,) = node.users
    if (
        _kind(block, reader) is nn.Dropout
    ):  # makes a gradient of its own, or with p = 0 passes on that of its reader
        return _has_gradient_of_its_own(block, reader, feeds_head)
    if reader.op == "output":
        return (
            feeds_head and reader.args[0] is node
        )  # not among side values, which other blocks read
    return _kind(block, reader) in _FRESH


def _replace_activation(block: fx.GraphModule, node: fx.Node) -> None:
    module: Any = _module(block, node)
    if getattr(module, "approximate", "none") != "none":
        return
    twin = LEAN[_kind(block, node)]
    made = twin() if twin is LeanGELU else twin(inplace=_writes(block, node))
    block.add_module(f"{node.name}_lean", made.train(block.training))
    with block.graph.inserting_before(node):
        replacement = block.graph.create_node(
            "call_module", f"{node.name}_lean", (node.args[0],), name=f"{node.name}_lean"
        )
    replacement.meta = node.meta
    node.replace_all_uses_with(replacement)
    block.graph.erase_node(node)
