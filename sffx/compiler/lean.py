"""Make a block's graph keep less for its backward pass, without changing a value or a gradient.

1. A ReLU that only feeds a max pool moves behind it: the two commute, and what the ReLU keeps shrinks with the pool.
2. A `torch.nn.MaxPool2d` becomes a `LeanMaxPool2d`, which keeps its indices but not its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from sffx.learning.pool import LeanMaxPool2d

_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = (F.relu, torch.relu, F.relu6)


def lean(block: fx.GraphModule) -> None:
    """Apply the rewrites to a block in place; its graph must be valid and stays so."""
    for node in list(block.graph.nodes):
        if _is_pool(block, node):
            _commute(block, node)
            _replace(block, str(node.target))
    block.graph.lint()
    block.recompile()


def _is_pool(block: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    pool = block.get_submodule(str(node.target))
    return type(pool) is nn.MaxPool2d and not pool.return_indices


def _commute(block: fx.GraphModule, pool: fx.Node) -> None:
    relu = pool.args[0]
    if not isinstance(relu, fx.Node) or not _is_relu(block, relu) or len(relu.users) > 1:
        return
    with block.graph.inserting_after(pool):
        moved = block.graph.node_copy(relu, lambda node: node)
    pool.replace_all_uses_with(moved)
    moved.args = (pool, *relu.args[1:])
    pool.replace_input_with(relu, relu.args[0])  # type: ignore[arg-type]
    block.graph.erase_node(relu)


def _is_relu(block: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(block.get_submodule(str(node.target))) in _RELU_MODULES
    return node.op == "call_function" and node.target in _RELU_FUNCTIONS and isinstance(node.args[0] if node.args else None, fx.Node)


def _replace(block: fx.GraphModule, target: str) -> None:
    pool = block.get_submodule(target)
    assert isinstance(pool, nn.MaxPool2d)
    lean_pool = LeanMaxPool2d(pool.kernel_size, pool.stride, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)
    owner, _, name = target.rpartition(".")
    setattr(block.get_submodule(owner), name, lean_pool.train(pool.training))
