"""Layers that read the batch as the steps of a sequence.

The first axis of each input is the batch. Recurrent layers and attention of torch read it as steps,
unless they are made with `batch_first=True`. A model does so by mistake, or since its own inputs
have the steps first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from sffx.blocks import BatchAxis
from sffx.compiler.facts import facts
from sffx.compiler.trace.flags import is_added
from sffx.errors import in_brief

_WITH_ATTENTION = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def batch_read_as_steps(graph: fx.Graph, root: nn.Module) -> str:
    """Return the names of the layers that read the batch as steps, as a subject with its verb."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "call_module" or is_added(node):
            continue
        if _is_steps_first(root.get_submodule(str(node.target))) and _reads_batch_first(node):
            found[str(node.target)] = None
    if not found:
        return ""
    names = [repr(name) for name in found]
    return f"{in_brief(names, 3)} {'reads' if len(names) == 1 else 'read'}"


def _is_steps_first(layer: nn.Module) -> bool:
    owner: Any = layer.self_attn if isinstance(layer, _WITH_ATTENTION) else layer
    is_known = isinstance(owner, (nn.RNNBase, nn.MultiheadAttention))
    return is_known and not owner.batch_first


def _reads_batch_first(node: fx.Node) -> bool:
    """Whether the first value that a node reads is a batch of sequences, (B, ..., ...)."""
    if not node.all_input_nodes:
        return False
    record = facts(node.all_input_nodes[0])
    value, batch = record.example, record.batch
    return isinstance(value, Tensor) and value.ndim == 3 and batch == BatchAxis(0)
