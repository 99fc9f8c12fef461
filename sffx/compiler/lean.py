"""Make a block's graph keep less for its backward pass, without changing a value or a gradient.

1. A ReLU that only feeds a max pool moves behind it: the two commute, and what the ReLU keeps shrinks with the pool.
2. A `torch.nn.MaxPool2d` becomes a `LeanMaxPool2d`, which keeps its indices but not its input.
3. An activation that only feeds one layer, or only leaves the block and so feeds a head, becomes its lean twin, whose backward pass writes
   over the gradient that the layer or the head made for it, in a block-local step.

An operation whose in-place write is read behind its back (`meta["read_behind"]`) is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sffx.learning.activation import LEAN, LeanGELU
from sffx.learning.pool import LeanMaxPool2d

_MONOTONE = (nn.ReLU, nn.ReLU6, F.relu, torch.relu, F.relu6)
# Layers whose backward pass makes a tensor of its own for the gradient of its input. Exact classes: a subclass may hand one through.
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Linear, LeanMaxPool2d)


def lean(block: fx.GraphModule, *, feeds_head: bool) -> None:
    """Apply the rewrites to a block in place; its graph must be valid and stays so.

    Args:
        block: the block.
        feeds_head: whether its output is read by a head, and by nothing else that gives it a gradient.
    """
    for node in list(block.graph.nodes):
        if _is_pool(block, node):
            _commute(block, node)
            _replace_pool(block, str(node.target))
    for node in list(block.graph.nodes):
        if _kind(block, node) in LEAN and _has_gradient_of_its_own(block, node, feeds_head):
            _replace_activation(block, node)
    block.delete_all_unused_submodules()
    block.graph.lint()
    block.recompile()


def _module(block: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def _kind(block: fx.GraphModule, node: fx.Node) -> Any:
    """Return the class of the module that a node calls, or the function; None where hooks make the module more than its class."""
    module = _module(block, node)
    if module is None:
        return node.target if node.op == "call_function" else None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return None if any(hooks) else type(module)


def _is_pool(block: fx.GraphModule, node: fx.Node) -> bool:
    pool: Any = _module(block, node)
    return _kind(block, node) is nn.MaxPool2d and not pool.return_indices and _reads_one(node)


def _commute(block: fx.GraphModule, pool: fx.Node) -> None:
    relu = pool.args[0]
    if not isinstance(relu, fx.Node) or _kind(block, relu) not in _MONOTONE or not _reads_one(relu) or len(relu.users) > 1:
        return
    if relu.meta.get("read_behind"):
        return
    with block.graph.inserting_after(pool):
        moved = block.graph.node_copy(relu, lambda node: node)
    pool.replace_all_uses_with(moved)
    moved.args = (pool, *relu.args[1:])
    pool.replace_input_with(relu, relu.args[0])  # type: ignore[arg-type]
    block.graph.erase_node(relu)


def _reads_one(node: fx.Node) -> bool:
    return bool(node.args) and isinstance(node.args[0], fx.Node)


def _replace_pool(block: fx.GraphModule, target: str) -> None:
    pool: Any = block.get_submodule(target)
    twin = LeanMaxPool2d(pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)
    owner, _, name = target.rpartition(".")
    setattr(block.get_submodule(owner), name, twin.train(pool.training))


def _has_gradient_of_its_own(block: fx.GraphModule, node: fx.Node, feeds_head: bool) -> bool:
    if len(node.users) != 1 or not _reads_one(node) or node.meta.get("read_behind"):
        return False
    (reader,) = node.users
    if _kind(block, reader) is nn.Dropout:  # makes a gradient of its own, or with p = 0 passes on that of its reader
        return _has_gradient_of_its_own(block, reader, feeds_head)
    if reader.op == "output":
        return feeds_head and reader.args[0] is node  # not among side values, which other blocks read
    return _kind(block, reader) in _FRESH


def _replace_activation(block: fx.GraphModule, node: fx.Node) -> None:
    module: Any = _module(block, node)
    if getattr(module, "approximate", "none") != "none":
        return
    if module is None:
        inplace = bool(node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False))
    else:
        inplace = getattr(module, "inplace", False)
    twin = LEAN[_kind(block, node)]
    made = twin() if twin is LeanGELU else twin(inplace=inplace)
    block.add_module(f"{node.name}_lean", made.train(block.training))
    with block.graph.inserting_before(node):
        replacement = block.graph.create_node("call_module", f"{node.name}_lean", (node.args[0],), name=f"{node.name}_lean")
    replacement.meta = node.meta
    node.replace_all_uses_with(replacement)
    block.graph.erase_node(node)
