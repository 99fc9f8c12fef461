"""Helpers for tests of single passes: a model as it is before a pass, and a graph as text."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, fx, nn

from sffx.blocks import Options
from sffx.compiler.analyse import analyse
from sffx.compiler.partition import partition
from sffx.compiler.policies import Cuts
from sffx.compiler.rewrite import rewrite
from sffx.compiler.trace.trace import trace
from sffx.learning.heads import make_heads
from sffx.learning.norms import make_norms


def layers(**modules: nn.Module) -> nn.Sequential:
    """Return layers in a row, by name."""
    return nn.Sequential(OrderedDict(modules))


def rewritten(model: nn.Module, after: list[str], x: Tensor, options: Options | None = None) -> Any:
    """Return a cut model before the passes that follow `rewrite`.

    Args:
        model: a classifier.
        after: names of the nodes to cut after.
        x: an example of its input.
        options: of the cut, without a norm by default.
    """
    options = options or Options(norm="none")
    traced = trace(model, x)
    analysis = analyse(traced)
    plan = partition(analysis, Cuts(analysis.require(after)), options)
    heads = make_heads(plan, traced.root)
    norms = make_norms(plan, traced.root)
    return rewrite(traced, plan, heads, norms)


def text(block: fx.GraphModule) -> str:
    """Return a graph as text, a line for each node that computes: "name = Kind(arguments)".

    The kind is the class of the module, or the name of the function, that the node calls. A module
    that is an argument is written as "self.name".
    """
    computing = [node for node in block.graph.nodes if node.op not in ("placeholder", "get_attr")]
    return "\n".join(_line(block, node) for node in computing)


def _line(block: fx.GraphModule, node: fx.Node) -> str:
    arguments = [_spelled(arg) for arg in node.args]
    arguments += [f"{name}={_spelled(value)}" for name, value in node.kwargs.items()]
    listed = ", ".join(arguments)
    if node.op == "output":
        return f"return {listed}"
    return f"{node.name} = {_kind(block, node)}({listed})"


def _kind(block: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_function":
        return node.target.__name__  # type: ignore[union-attr]
    module: Any = block.get_submodule(str(node.target))
    mode = "[inplace]" if getattr(module, "inplace", False) else ""
    return f"{type(module).__name__}{mode}"


def _spelled(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_spelled(part) for part in value)})"
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    return repr(value)
