"""`x.squeeze()` removes every axis of one, and so the batch axis of a batch of one sample.

What follows then takes the features for samples, or fails. The graph keeps the batch axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sffx.blocks import BatchAxis
from sffx.compiler.facts import facts

KEPT = (
    "the forward removes axes of one, as x.squeeze() does, and with them the batch axis of a "
    "single sample: the cut model keeps it"
)

_Axes = tuple[int, ...] | None  # None stands for all axes


def squeeze_features(x: Tensor, batch_axis: int, axes: _Axes = None) -> Tensor:
    """Return a tensor without its axes of one, but with its batch axis.

    Args:
        x: a batch.
        batch_axis: of x.
        axes: to remove where they have a size of one; all if None.
    """
    removed = []
    for axis in range(x.ndim) if axes is None else axes:
        is_batch = axis % x.ndim == batch_axis
        # No look at the size of the batch: in an export it is a symbol, which a look would fix.
        if not is_batch and x.shape[axis] == 1:
            removed.append(axis)
    return x.squeeze(removed)


def keep_batch_axes(graph: fx.Graph) -> bool:
    """Let squeezes keep the batch axis; return whether there is one that would not."""
    changed = False
    for node in graph.nodes:
        arguments = _of_squeeze(node)
        if arguments is None:
            continue
        x, axes = arguments
        batch = facts(x).batch
        if isinstance(batch, BatchAxis) and _reaches(axes, batch.axis, facts(x).example.ndim):
            node.op, node.target = "call_function", squeeze_features
            node.args, node.kwargs = (x, batch.axis, axes), {}
            changed = True
    return changed


def _of_squeeze(node: fx.Node) -> tuple[fx.Node, _Axes] | None:
    """Return what a node squeezes, and the axes that it names; None for other nodes."""
    is_method = node.op == "call_method" and node.target == "squeeze"
    if not is_method and node.target is not torch.squeeze:
        return None
    given: dict[str, Any] = dict(zip(("input", "dim"), node.args, strict=False))
    given.update(node.kwargs)
    x, axes = given.get("input"), given.get("dim")
    if isinstance(axes, int):
        axes = (axes,)
    is_known = axes is None or all(isinstance(axis, int) for axis in axes)
    if not isinstance(x, fx.Node) or not is_known:
        return None
    return x, None if axes is None else tuple(axes)


def _reaches(axes: _Axes, batch_axis: int, ndim: int) -> bool:
    """Whether the batch axis is among some axes."""
    return axes is None or any(axis % ndim == batch_axis for axis in axes)
