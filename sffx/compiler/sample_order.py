"""The order of the samples along the batch axis: that of the inputs, or another one.

A forward may sort its batch, as by the lengths of sequences, and bring it back later:

    lengths, order = lengths.sort(descending=True)
    states = self.rnn(x[order])
    return self.head(states[order.argsort()])

Between the two no cut may lie: a head would be given the scores of one sample and the target of
another one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from sffx.blocks import BatchAxis
from sffx.compiler.facts import facts
from sffx.compiler.qualnames import makes_values, name_of_target
from sffx.compiler.walks import nodes_behind
from sffx.tensors import can_learn, holds_tensor

# They return an order of samples, or samples in a new order.
_SORTS = ("argsort", "msort", "randperm", "sort", "topk")

# They read samples by an index along one axis.
_READ_BY_INDEX = ("gather", "index_select", "take_along_dim")

# They write samples by an index, which brings back what was read by it. A trace writes
# `y[order] = x` as `set_item`.
_WRITE_BY_INDEX = ("index_add", "index_copy", "index_put", "scatter", "scatter_add", "set_item")

# The place of the axis among the arguments behind the tensor, where it is not the first one.
_PLACE_OF_AXIS = {"roll": 1, "take_along_dim": 1, "topk": 1}
_DEFAULT_AXIS: dict[str, Any] = {"sort": -1, "argsort": -1, "topk": -1, "msort": 0}


def is_out_of_order(batch: Any) -> bool:
    """Return whether the record of a batch axis says that samples lie in another order."""
    return isinstance(batch, BatchAxis) and batch.permuted


def is_permuted(node: fx.Node, axis: int) -> bool:
    """Return whether the samples of a new value lie in another order than those of the inputs.

    1. To read samples by an order, to flip or to roll them changes their order. To do so once more
       is taken to bring them back.
    2. To write samples by an index brings them back. New zeros have no order.
    3. Any other operation keeps the order of what it reads. If one of several values has the order
       of the inputs, so has the result: in mixup, `x + x[order]` belongs to the targets of x.

    Args:
        node: computes the value. Its arguments have their facts.
        axis: of the batch.
    """
    name = name_of_target(node.target).rstrip("_")  # in place it does the same
    if name == "randperm":  # it reads no tensor, so it has no axis to compare
        return True
    if name in _SORTS:
        return _axis_of_call(node, axis) == axis
    if name in _WRITE_BY_INDEX or makes_values(node.target) or _restores_order(node):
        return False
    if _changes_order(node, name):
        was_out_of_order = is_out_of_order(facts(node.all_input_nodes[0]).batch)
        return not was_out_of_order
    sources = list(_samples_read(node))
    if not any(batch.permuted for _, batch in sources):
        return False
    # Noise that is added to permuted samples has no order, so they stay permuted.
    return all(batch.permuted or _is_made_of_sizes(arg) for arg, batch in sources)


def _restores_order(node: fx.Node) -> bool:
    """Whether a node is a recurrent layer on a pack of sequences, which were sorted by length.

    The layer returns its last states in the order from before the sort. Its outputs stay in a pack.
    """
    for arg in node.all_input_nodes:
        value = facts(arg).example
        if isinstance(value, PackedSequence) and value.unsorted_indices is not None:
            return node.op == "call_module"
    return False


def _changes_order(node: fx.Node, name: str) -> bool:
    """Return whether a node reads the samples of its first argument by an order, or turns them."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    batch = facts(node.args[0]).batch
    # Several rows of one sample are read in any order, as a graph network reads the nodes that its
    # edges name.
    if not isinstance(batch, BatchAxis) or batch.rows > 1:
        return False
    if name in _READ_BY_INDEX:
        is_along_batch = _axis_of_call(node, batch.axis) == batch.axis
        return is_along_batch and any(_is_order(index) for index in node.all_input_nodes[1:])
    if name in ("flip", "roll"):
        return batch.axis in _axes_of_call(node, name)
    if node.target is operator.getitem:
        index = _index_along(node.args[1], batch.axis, facts(node.args[0]).example.ndim)
        return isinstance(index, fx.Node) and _is_order(index)
    return False


def _index_along(index: Any, axis: int, ndim: int) -> Any:
    """Return the part of an index that is for an axis, None where there is none.

    Args:
        index: as it is written, `order`, `(order, 0)` or `(None, ..., order)`.
        axis: of the tensor that is read.
        ndim: how many axes the tensor has.
    """
    parts = index if isinstance(index, tuple) else (index,)
    taken = [_axes_taken(part) for part in parts]
    first = 0  # the first axis that a part is for
    for part, num_axes in zip(parts, taken, strict=True):
        if part is Ellipsis:
            num_axes = ndim - sum(taken)
        if first <= axis < first + num_axes:
            return part
        first += num_axes
    return None


def _axes_taken(part: Any) -> int:
    """Return how many axes a part of an index is for, 0 for the Ellipsis and for a new axis."""
    if part is None or part is Ellipsis:
        return 0
    value = facts(part).example if isinstance(part, fx.Node) else part
    is_mask = isinstance(value, Tensor) and value.dtype is torch.bool
    return value.ndim if is_mask else 1


def _is_order(node: fx.Node) -> bool:
    """Whether a value is an index that comes from a sort, from chance or from an input.

    One that counts the samples, as `torch.arange`, leaves their order.
    """
    for each in nodes_behind(node, _holds_indices):
        is_source = each.op == "placeholder" or name_of_target(each.target) in _SORTS
        if is_source and _holds_indices(each):
            return True
    return False


def _holds_indices(node: fx.Node) -> bool:
    """Return whether a value is a tensor of integers, or a tuple or a list with one."""
    value = facts(node).example
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(part, Tensor) and _is_integer(part) for part in parts)


def _is_integer(value: Tensor) -> bool:
    # An index of bools or bytes is a mask: it drops samples and leaves the order of the others.
    is_mask = value.dtype.itemsize == 1
    return not can_learn(value) and not is_mask


def _axis_of_call(node: fx.Node, default: int) -> int:
    """Return the axis that an operation works along, `default` where that cannot be told."""
    axes = _axes_of_call(node, name_of_target(node.target))
    return axes[0] if axes else default


def _axes_of_call(node: fx.Node, name: str) -> list[int]:
    """Return the axes of its tensor that an operation works along, counted from the front."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return []
    written = _axes_as_written(node, name)
    axes = written if isinstance(written, (tuple, list)) else (written,)
    ndim = facts(first).example.ndim
    # An axis that the model computes is a node, and unknown.
    return [each % ndim for each in axes if type(each) is int]


def _axes_as_written(node: fx.Node, name: str) -> Any:
    """Return one axis, a list of axes, or () where a call is given none and has no default."""
    by_name = node.kwargs.get("dim", node.kwargs.get("dims"))
    if by_name is not None:
        return by_name
    behind_tensor = node.args[1:]
    if name == "flip":  # x.flip([0, 1]) or x.flip(0, 1)
        has_list = behind_tensor and isinstance(behind_tensor[0], (tuple, list))
        return behind_tensor[0] if has_list else behind_tensor
    place = _PLACE_OF_AXIS.get(name, 0)
    if len(behind_tensor) > place:
        return behind_tensor[place]
    return _DEFAULT_AXIS.get(name, ())


def _samples_read(node: fx.Node) -> Iterator[tuple[fx.Node, BatchAxis]]:
    """Yield for each tensor with a batch axis that a node reads the argument, and the axis.

    Where it reads samples of floats, indices and masks beside them do not count.
    """
    found: list[tuple[fx.Node, BatchAxis, bool]] = []  # and whether it is of floats
    for arg in node.all_input_nodes:
        for value, batch in _parts(node, arg):
            if isinstance(batch, BatchAxis):
                found.append((arg, batch, value.is_floating_point()))
    has_floats = any(is_float for *_, is_float in found)
    for arg, batch, is_float in found:
        if is_float or not has_floats:
            yield arg, batch


def _parts(node: fx.Node, arg: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Yield the values that a node reads of an argument, each with its batch axis."""
    value, batch = facts(arg).example, facts(arg).batch
    if not isinstance(batch, tuple):
        yield value, batch
        return
    # A sort returns (values, order). `getitem` reads one of them: the other does not count.
    if node.target is operator.getitem and batch:
        picked: Any = node.args[1]
        value, batch = value[picked], batch[picked]
    yield from zip(tree_leaves(value), tree_leaves(batch), strict=False)


def _is_made_of_sizes(node: fx.Node) -> bool:
    """Whether a value holds no sample, as zeros or random numbers for each do."""
    return not any(each.op == "placeholder" for each in nodes_behind(node, _may_hold_samples))


def _may_hold_samples(node: fx.Node) -> bool:
    return not makes_values(node.target) and holds_tensor(facts(node).example)
