"""Find the channel axis of each value in a traced graph from the layers that made it.

1. A layer says where its channels are: a convolution or BN at axis 1, a linear layer or an
   embedding at the last axis. A layer of the user's own has them at the only axis whose size one
   of its parameters has.
2. An operation that is no such layer (an addition, an activation, a permutation, a slice) passes on
   the axis of its input. So does a layer without weights, such as a pool: it says that the channels
   are at axis 1 only where nothing before it says more.
3. An axis whose size changes with the height, width or length of the input holds no channels,
   whatever a layer says.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from sffx.blocks import BatchAxis
from sffx.compiler.batch_axis import axis_after_reshape, is_reshape
from sffx.compiler.facts import facts
from sffx.compiler.qualnames import called_module, has_tensors
from sffx.compiler.trace.trace import Trace
from sffx.tensors import storage_key

_FIRST_CLASSES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
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
    F.linear,
    F.embedding,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.einsum,
    operator.matmul,
    "matmul",
)
_CATS = (torch.cat, torch.concat, torch.concatenate)

# The attributes in which layers have the number of channels that they return.
_WIDTHS = ("out_features", "out_channels", "num_features", "embedding_dim")


def channel_axes(trace: Trace) -> dict[str, int]:
    """Return the channel axis of each node's value, where it can be told.

    Axes are counted from the front; the batch is axis 0.
    """
    axes: dict[str, int] = {}
    for node in trace.graph.nodes:
        axis = _axis_from_above(node, trace.root, axes)
        if axis is not None and facts(node).batch != BatchAxis(axis):
            axes[node.name] = axis
    # Where channels are split and merged again (a channel shuffle), the way down loses their axis.
    for node in reversed(trace.graph.nodes):
        if node.name not in axes and _num_axes(node) >= 2:
            axis = _axis_from_readers(node, trace.root, axes)
            if axis is not None:
                axes[node.name] = axis
    return axes


def _axis_from_above(node: Node, root: nn.Module, axes: dict[str, int]) -> int | None:
    """Return the axis that a node's layer declares, or that its inputs pass on.

    Args:
        node: the node.
        root: the traced model.
        axes: of the nodes before it.
    """
    value = facts(node).example
    if isinstance(value, Tensor) and value.ndim >= 2:
        axis = 1 if value.ndim == 2 else _axis_of_tensor(node, value, root, axes)
        return _of_fixed_size(node, axis)
    if isinstance(value, (tuple, list)):
        return _of_fixed_size(node, _axis_of_tuple(node, root, axes))
    return None


def _of_fixed_size(node: Node, axis: int | None) -> int | None:
    """Return the axis of channels, given what the layers say, among axes of a fixed size.

    Args:
        node: computes a tensor, or a tuple with one.
        axis: of its channels, as the layers say.

    Returns:
        This axis if its size is fixed. Else the only axis with a fixed size, None where there are
        several or none.
    """
    record = facts(node)
    value = _first_tensor(record.example)
    resized = _first_tensor(record.resized)
    if axis is None or value is None or resized is None or value.ndim != resized.ndim:
        return axis
    fixed = []
    for i in range(1, value.ndim):
        is_batch = record.batch == BatchAxis(i)
        if value.shape[i] == resized.shape[i] and not is_batch:
            fixed.append(i)
    if axis in fixed:
        return axis
    return fixed[0] if len(fixed) == 1 else None


def _axis_of_tensor(node: Node, value: Tensor, root: nn.Module, axes: dict[str, int]) -> int | None:
    """Return the axis of a tensor: that of the node's own layer, else that of a value it reads."""
    declared = _declared(node, value, root)
    if declared is not None:
        return declared
    # Where paths meet and disagree, the one that began earlier is the residual path. fx compares
    # nodes by their place in the graph.
    sources = sorted(arg for arg in node.all_input_nodes if arg.name in axes)
    if not sources:
        axis = _axis_of_weightless(node, value, root)
        return axis if axis is not None else _axis_of_layer_inside(node, value, root)
    # The first source whose number of channels is found in the value again.
    chosen = sources[0]
    for source in sources:
        width = _width(facts(source).example, axes[source.name])
        if width in value.shape[1:]:
            chosen = source
            break
    return _moved(node, chosen, axes[chosen.name], value, root)


def _axis_of_tuple(node: Node, root: nn.Module, axes: dict[str, int]) -> int | None:
    """Return the axis of a tuple of tensors: the outputs of an RNN, or chunks of one value."""
    first = _first_tensor(facts(node).example)
    declared = _declared(node, first, root) if first is not None else None
    if declared is not None:
        return declared
    source = next((arg for arg in node.all_input_nodes if arg.name in axes), None)
    if source is None:
        return None
    axis = axes[source.name]
    if first is None or first.ndim == _num_axes(source):
        return axis
    # The parts have fewer axes than the value: `unbind` took one away.
    return _moved(node, source, axis, first, root)


def _axis_from_readers(node: Node, root: nn.Module, axes: dict[str, int]) -> int | None:
    """Return the axis that a reader's layer declares, or that a reader has and leaves in place."""
    for reader in node.users:
        value = facts(reader).example
        if _num_axes(reader) != _num_axes(node):
            continue
        declared = _declared(reader, value, root) if isinstance(value, Tensor) else None
        axis = declared if declared is not None else axes.get(reader.name)
        if axis is not None and not _is_permuted(value, facts(node).example):
            return _of_fixed_size(node, axis)
    return None


def _declared(node: Node, value: Tensor, root: nn.Module) -> int | None:
    """Return the axis that the node's own layer declares."""
    last = value.ndim - 1
    if node.target is F.layer_norm:
        given = node.args[1:]
        shape: Any = given[0] if given else node.kwargs.get("normalized_shape", ())
        if isinstance(shape, Node):  # x.shape[1:]
            shape = facts(shape).example
        return last if len(shape) == 1 else None
    module = called_module(node, root)
    if module is not None:
        return _declared_by_module(module, value)
    if node.target in _FIRST_FUNCTIONS:
        return 1
    return last if node.target in _LAST_FUNCTIONS else None


def _declared_by_module(module: nn.Module, value: Tensor) -> int | None:
    """Return the axis that a layer of torch declares, None for a pool and for other modules."""
    if isinstance(module, _FIRST_CLASSES):
        return _axis_before_space(module, value) if has_tensors(module) else None
    if isinstance(module, nn.LayerNorm):
        return _declared_by_layer_norm(module, value)
    return value.ndim - 1 if isinstance(module, _LAST_CLASSES) else None


def _axis_of_weightless(node: Node, value: Tensor, root: nn.Module) -> int | None:
    """Return the axis of channels of a layer without weights, as torch documents it."""
    module = called_module(node, root)
    return _axis_before_space(module, value) if isinstance(module, _FIRST_CLASSES) else None


def _axis_before_space(module: nn.Module, value: Tensor) -> int:
    """Return the axis in front of height and width, 1 where the batch alone is in front of it.

    A subclass of a convolution may read (T, B, C, H, W), with its channels at axis 2.
    """
    for base in type(module).__mro__:
        # The names of torch's own classes tell the axes of space: Conv2d, BatchNorm3d.
        ending = base.__name__[-2:]
        if base.__module__.startswith("torch.nn.") and ending in ("1d", "2d", "3d"):
            axes_of_space = int(ending[0])
            # A BatchNorm1d may read (B, C), without such an axis.
            return max(value.ndim - axes_of_space - 1, 1)
    return 1


def _axis_of_layer_inside(node: Node, value: Tensor, root: nn.Module) -> int | None:
    """Return the axis that the last layer inside a leaf declares, if its width is found there."""
    leaf = called_module(node, root)
    if leaf is None:
        return None
    for module in reversed(list(leaf.modules())):
        axis = _declared_by_module(module, value)
        widths = [getattr(module, name, None) for name in _WIDTHS]
        if axis is not None and value.shape[axis] in widths:
            return axis
    return _axis_of_own_parameters(node, value, leaf)


def _axis_of_own_parameters(node: Node, value: Tensor, leaf: nn.Module) -> int | None:
    """Return the only axis whose size is one of a leaf's own parameters, None for several or none.

    A graph layer in one class multiplies by a parameter of its own, and holds no layer of torch.
    """
    sizes = {size for parameter in leaf.parameters(recurse=False) for size in parameter.shape}
    resized = facts(node).resized
    found = []
    for axis in range(1, value.ndim):
        is_batch = facts(node).batch == BatchAxis(axis)
        changes = isinstance(resized, Tensor) and resized.shape[axis] != value.shape[axis]
        if is_batch or changes:
            continue
        if value.shape[axis] in sizes - {1}:
            found.append(axis)
    return found[0] if len(found) == 1 else None


def _declared_by_layer_norm(module: nn.LayerNorm, value: Tensor) -> int | None:
    """Return the last axis for a norm over (C,), None for one over (C, H, W).

    The latter tells nothing, so that its value has the axis of its input.
    """
    shape = module.normalized_shape
    is_plain = type(module).forward is nn.LayerNorm.forward
    if is_plain or value.shape[1] != shape[-1]:
        return value.ndim - 1 if len(shape) == 1 else None
    # torchvision's LayerNorm2d is a subclass that keeps its channels at axis 1.
    return 1 if value.shape[-1] != shape[-1] else None


def _moved(node: Node, source: Node, axis: int, value: Tensor, root: nn.Module) -> int | None:
    """Return the channel axis of a value, from that of its source.

    Args:
        node: makes the value; may move axes, fold them or leave them.
        source: the node whose value it reads.
        axis: of the source's channels.
        value: the value.
        root: the traced model.
    """
    before = _first_tensor(facts(source).example)
    order = _permutation(value, before)
    if order is not None:
        return order.index(axis)
    if isinstance(before, Tensor) and is_reshape(node, root):
        reshaped = axis_after_reshape(before.shape, axis, value.shape)
        if reshaped:  # neither None nor the batch axis, 0
            return reshaped
    width = _width(before, axis)
    has_same_axes = before is not None and value.ndim == before.ndim
    if has_same_axes and value.shape[axis] == width:
        return axis
    # A concatenation along the channels changes their number, but not their place.
    if has_same_axes and node.target in _CATS:
        return axis
    # Other operations move the channels to an axis of the same size.
    batch = facts(node).batch
    batch_axis = batch.axis if isinstance(batch, BatchAxis) else 0
    matches = []
    for i in range(1, value.ndim):
        if value.shape[i] == width and i != batch_axis:
            matches.append(i)
    if not matches:
        return axis if has_same_axes else None
    # Channels at axis 1 stay the first such axis when axes behind them are folded, and channels at
    # the end stay the last one when axes before them are.
    return matches[0] if axis == 1 else matches[-1]


def _is_permuted(value: Any, before: Any) -> bool:
    """Return whether a value is a view of another one with its axes in another order."""
    if not isinstance(value, Tensor):
        return False
    return _permutation(value, before) not in (None, list(range(value.ndim)))


def _permutation(value: Tensor, before: Any) -> list[int] | None:
    """Return the order of axes of a value that is a permuted view, None for other values."""
    if not isinstance(before, Tensor) or before.ndim != value.ndim:
        return None
    if storage_key(before) != storage_key(value):
        return None
    axes_before = list(zip(before.shape, before.stride(), strict=True))
    axes = list(zip(value.shape, value.stride(), strict=True))
    if sorted(axes_before) != sorted(axes):
        return None
    order: list[int] = []
    for axis in axes:
        # Two axes may be of one size and stride; then each gets a place of its own.
        for place, axis_before in enumerate(axes_before):
            if axis_before == axis and place not in order:
                order.append(place)
                break
    return order


def _first_tensor(value: Any) -> Tensor | None:
    """Return a tensor itself, or the first one in a tuple or a list; None where there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((part for part in value if isinstance(part, Tensor)), None)
    return None


def _num_axes(node: Node) -> int:
    first = _first_tensor(facts(node).example)
    return first.ndim if first is not None else 0


def _width(value: Any, axis: int) -> int:
    """Return the size of a value along an axis, -1 where it has no such axis."""
    first = _first_tensor(value)
    if first is None or axis >= first.ndim:
        return -1
    return int(first.shape[axis])
