"""Remarks about a traced model: what of the original is no part of the graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from sffx.compiler.qualnames import outermost, parameters_of
from sffx.errors import in_brief


def notes(root: nn.Module, graph: fx.Graph, *, checkpointed: bool) -> Iterator[str]:
    """Yield the remarks.

    Args:
        root: the traced model.
        graph: of it.
        checkpointed: whether the trace met gradient checkpointing.
    """
    if root._forward_hooks or root._forward_pre_hooks:
        yield "the hooks of the model itself are no part of the cut model; those of its layers are"
    idle = _idle(root, _used_parameters(root, graph))
    if idle:
        yield f"left out, since the logits do not depend on them: {in_brief(idle, 4)}"
    if checkpointed:
        yield "gradient checkpointing in the model is left out"


def _used_parameters(root: nn.Module, graph: fx.Graph) -> set[int]:
    """Return the `id` of each parameter that the graph reads."""
    used: set[int] = set()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            used.update(id(p) for p in parameters_of(root, str(node.target)).values())
    return used


def _idle(root: nn.Module, used: set[int]) -> list[str]:
    """Return the outermost modules none of whose parameters is used, and unused parameters."""
    idle = []
    for name, module in root.named_modules():
        owned = {id(p) for p in module.parameters()}
        if name and owned and not owned & used:
            idle.append(name)
    for name, parameter in root.named_parameters():
        if id(parameter) not in used:
            idle.append(name)
    return outermost(idle)
