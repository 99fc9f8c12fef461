"""Find the channel axis of each value in a traced graph from the layers that made it.

A layer says where its channels are: a convolution or BN at axis 1, a linear layer or an embedding at the last axis. What has no layer
of its own (additions, activations, permutations, slices) passes on the axis of its input.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.compiler.facts import facts
from sffx.compiler.trace.trace import Trace
from sffx.tensors import storage_key

_FIRST_CLASSES = (
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm),
    *(
        nn.modules.pooling._MaxPoolNd,
        nn.modules.pooling._AvgPoolNd,
        nn.modules.pooling._AdaptiveAvgPoolNd,
    ),
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_LAST_CLASSES = (
    nn.Linear,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.Bilinear,
)
_FIRST_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.group_norm, F.instance_norm)
_LAST_FUNCTIONS = (
    *(F.linear, F.embedding, F.scaled_dot_product_attention),
    *(torch.matmul, torch.bmm, torch.einsum, operator.matmul, "matmul"),
)


def channel_axes(trace: Trace) -> dict[str, int]:
    """Return the channel axis, counted from the front with the batch at 0, of each node whose value has one that can be told."""
    axes: dict[str, int] = {}
    for node in trace.graph.nodes:
        value = facts(node).example
        if isinstance(value, Tensor) and value.ndim >= 2:
            axis = 1 if value.ndim == 2 else _axis(node, value, trace.root, axes)
            if axis is not None:
                axes[node.name] = axis
        elif isinstance(value, (tuple, list)):
            _pass_on(node, trace.root, axes)
    for node in reversed(trace.graph.nodes):
        if node.name not in axes and _ndim(node) >= 2:
            _ask_readers(node, trace.root, axes)
    return axes


def _axis(node: fx.Node, value: Tensor, root: nn.Module, axes: dict[str, int]) -> int | None:
    declared = _declared(node, value, root)
    if declared is not None:
        return declared
    # Where paths meet and disagree, the one that began earlier is the residual path.
    known = sorted(arg for arg in node.all_input_nodes if arg.name in axes)
    if not known:
        return None
    source = next((arg for arg in known if _size(arg, axes) in value.shape[1:]), known[0])
    return _moved(node, source, axes[source.name], value)


def _declared(node: fx.Node, value: Tensor, root: nn.Module) -> int | None:
    """Return the axis that the node's own layer declares."""
    if node.target is F.layer_norm:
        shape = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else ())
        return _normalised_axis(len(shape), value)  # type: ignore[arg-type]
    if node.op != "call_module":
        return (
            1
            if node.target in _FIRST_FUNCTIONS
            else value.ndim - 1
            if node.target in _LAST_FUNCTIONS
            else None
        )
    module = root.get_submodule(str(node.target))
    if isinstance(module, _FIRST_CLASSES):
        return 1
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        if type(module).forward is nn.LayerNorm.forward or value.shape[1] != shape[-1]:
            return _normalised_axis(len(shape), value)
        return (
            1 if value.shape[-1] != shape[-1] else None
        )  # torchvision's LayerNorm2d is one, and keeps its channels at axis 1
    return value.ndim - 1 if isinstance(module, _LAST_CLASSES) else None


def _normalised_axis(axes: int, value: Tensor) -> int | None:
    """Return the axis of the channels of what a layer norm returns: over (C,), the last one; over (C, H, W), that of its input."""
    return value.ndim - 1 if axes == 1 else None


def _moved(node: fx.Node, source: fx.Node, axis: int, value: Tensor) -> int | None:
    """Follow the channel axis of `source` through a node that moves axes or leaves them."""
    before = _first(facts(source).example)
    order = _permutation(value, before)
    if order is not None:
        return order.index(axis)
    same_ndim = value.ndim == getattr(before, "ndim", 0)
    if same_ndim and value.shape[axis] == _width(before, axis):
        return axis
    if same_ndim and node.target in (torch.cat, torch.concat, torch.concatenate):
        return axis
    matches = [i for i in range(1, value.ndim) if value.shape[i] == _width(before, axis)]
    if (
        len(matches) > 1
    ):  # axes before the channels keep their places when the ones behind are folded, and the other way round
        return matches[0] if axis == 1 else matches[-1]
    return matches[0] if matches else (axis if same_ndim else None)


def _permutation(value: Tensor, before: Any) -> list[int] | None:
    """Return the order of axes of a value that is a permuted view, None for other values."""
    if (
        not isinstance(before, Tensor)
        or before.ndim != value.ndim
        or storage_key(before) != storage_key(value)
    ):
        return None
    axes = [*zip(before.shape, before.stride(), strict=True)]
    if sorted(axes) != sorted(zip(value.shape, value.stride(), strict=True)):
        return None
    order: list[int] = []
    for axis in zip(value.shape, value.stride(), strict=True):
        order.append(next(i for i, other in enumerate(axes) if other == axis and i not in order))
    return order


def _pass_on(node: fx.Node, root: nn.Module, axes: dict[str, int]) -> None:
    """Let a tuple of tensors have the axis that its layer declares (the outputs of an RNN), or that of what it was made from (chunks)."""
    first = next((v for v in facts(node).example if isinstance(v, Tensor)), None)
    axis = _declared(node, first, root) if first is not None else None
    source = next((arg for arg in node.all_input_nodes if arg.name in axes), None)
    if axis is None and source is not None:
        axis = (
            axes[source.name]
            if first is None or first.ndim == _ndim(source)
            else _moved(node, source, axes[source.name], first)
        )
    if axis is not None:
        axes[node.name] = axis


def _ask_readers(node: fx.Node, root: nn.Module, axes: dict[str, int]) -> None:
    """Take the axis from what reads the value: a layer that declares its input's, or a node that keeps the order of axes.

    Needed where channels are split and merged again (a channel shuffle), which loses track of them on the way down.
    """
    for reader in node.users:
        value = facts(reader).example
        if _ndim(reader) != _ndim(node):
            continue
        declared = _declared(reader, value, root) if isinstance(value, Tensor) else None
        axis = declared if declared is not None else axes.get(reader.name)
        permuted = isinstance(value, Tensor) and _permutation(value, facts(node).example) not in (
            None,
            [*range(value.ndim)],
        )
        if axis is not None and not permuted:
            axes[node.name] = axis
            return


def _ndim(node: fx.Node) -> int:
    first = _first(facts(node).example)
    return first.ndim if isinstance(first, Tensor) else 0


def _first(value: Any) -> Any:
    """Return a value that is no tuple itself, of a tuple its first tensor."""
    return (
        next((v for v in value if isinstance(v, Tensor)), None)
        if isinstance(value, (tuple, list))
        else value
    )


def _size(node: fx.Node, axes: dict[str, int]) -> int:
    return _width(facts(node).example, axes[node.name])


def _width(value: Any, axis: int) -> int:
    first = (
        value
        if isinstance(value, Tensor)
        else next((v for v in value if isinstance(v, Tensor)), None)
    )
    return int(first.shape[axis]) if first is not None and axis < first.ndim else -1
