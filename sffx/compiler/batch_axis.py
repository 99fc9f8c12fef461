"""The batch axis of each value: found by what changes when the batch does, not by its size.

A trace runs each node at two batch sizes. The axis of a tensor whose size differs is its batch. It
may be folded with others: (B, N, C) flattened to (B * N, C) has N rows for each sample, one behind
the other, and (N, B, C) flattened has every B-th row. Which of the two it is follows from the
operations on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from sffx.blocks import BatchAxis
from sffx.compiler.facts import facts
from sffx.compiler.qualnames import called_module, has_tensors, name_of_target
from sffx.compiler.sample_order import is_permuted
from sffx.compiler.trace.flags import is_added

# The batch sizes of a trace. Models that put samples in pairs, threes or fours run at both.
BATCH_SIZES = (60, 36)

_RESHAPES = (
    "contiguous",
    "flatten",
    "reshape",
    "reshape_as",
    "squeeze",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
)
_TILES = ("repeat", "tile")
_CATS = ("cat", "concat", "concatenate")
_CONSTANTS = ("full", "new_full", "new_ones", "new_zeros", "ones", "zeros")


def batch_sizes(arguments: Any) -> tuple[int, int]:
    """Return the batch size of a model's arguments, and another one."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    size = len(tensors[0])
    other = BATCH_SIZES[1] if size == BATCH_SIZES[0] else 2 * size
    return size, other


def at_batch_size(arguments: Any, size: int) -> Any:
    """Return arguments with batches of another size: each tensor in them, however deep."""

    def resized(tensor: Tensor) -> Tensor:
        return tensor.new_empty((size, *tensor.shape[1:]))

    return tree_map_only(Tensor, resized, arguments)


def find_batch(
    node: fx.Node, root: nn.Module, value: Any, other: Any, sizes: tuple[int, int]
) -> Any:
    """Return the batch axis of a node's value, None where it has none or it cannot be told.

    For a tuple or a list it is a tuple, with one for each part.

    Args:
        node: whose arguments have their facts.
        root: the model that the node calls modules of.
        value: of the node, at the first batch size.
        other: at the second.
        sizes: of the two batches.
    """
    if isinstance(value, Tensor):
        return _axis_of_tensor(node, root, value, other, sizes)
    if not isinstance(value, (tuple, list)):
        return None
    if not _same_length(value, other):
        return ()
    pairs = zip(value, other, strict=True)
    return tuple(find_batch(node, root, one, two, sizes) for one, two in pairs)


def starts_with_batch(value: Any) -> bool:
    """Return whether a batch axis is that of (B, ...), with one row for each sample, in order."""
    return value == BatchAxis(0) and not value.permuted


def is_reshape(node: fx.Node, root: nn.Module) -> bool:
    """Return whether a node's value holds the values of its first argument in the same order."""
    if is_added(node):
        return False
    module = called_module(node, root)
    if module is not None:
        return isinstance(module, (nn.Flatten, nn.Unflatten))
    is_call = node.op in ("call_method", "call_function")
    return is_call and name_of_target(node.target) in _RESHAPES


def axis_after_reshape(before: Sequence[int], axis: int, after: Sequence[int]) -> int | None:
    """Return the axis that a reshape makes of a whole axis, None where it is split or merged.

    Args:
        before: the sizes of all axes.
        axis: that is looked for.
        after: the sizes of all axes after the reshape.
    """
    if math.prod(before) != math.prod(after):
        return None
    # A reshape keeps the order, so neighbours along the axis stay as many values apart.
    step = math.prod(before[axis + 1 :])
    for i, size in enumerate(after):
        step_after = math.prod(after[i + 1 :])
        if size == before[axis] and step_after == step:
            return i
    return None


def _axis_of_tensor(
    node: fx.Node, root: nn.Module, value: Tensor, other: Any, sizes: tuple[int, int]
) -> BatchAxis | None:
    """Return the batch axis of a tensor, from its values at both batch sizes; see `find_batch`.

    At batch sizes 60 and 36, shapes (120, C) and (72, C) are two rows for each sample. Shapes
    (61, C) and (37, C), a row beside the batch, have no batch axis.
    """
    if not isinstance(other, Tensor) or value.ndim != other.ndim:
        return None
    changed = [i for i, size in enumerate(value.shape) if size != other.shape[i]]
    if len(changed) != 1:
        return None
    axis = changed[0]
    rows, rest = divmod(value.shape[axis], sizes[0])
    rows_at_other_size, rest_at_other_size = divmod(other.shape[axis], sizes[1])
    if rest or rest_at_other_size or rows != rows_at_other_size:
        return None
    slower = _slower_rows(node, root, value, axis, rows) if rows > 1 else 1
    alike = slower is None and _are_rows_alike(node, value, axis)
    return BatchAxis(axis, rows, slower, is_permuted(node, axis), alike)


def _slower_rows(node: fx.Node, root: nn.Module, value: Tensor, axis: int, rows: int) -> int | None:
    """Return the `BatchAxis.slower` of a value with several rows for each sample, None if unknown.

    1. A reshape keeps the order of all values.
    2. `repeat` puts whole batches behind each other, `repeat_interleave` the rows of each sample.
    3. A concatenation puts whole batches behind each other.
    4. A layer without tensors may be a reshape by another name, as those of einops. It is run on
       the numbers of the samples.
    5. A graph network adds messages to rows that an index names, the nodes of all graphs. Such rows
       have the order of earlier values with as many rows.
    6. Any other operation keeps the order of the values with as many rows that it reads.
    """
    sources = list(_sources(node))
    axes_read = [batch for _, batch in sources]
    operation = name_of_target(node.target)
    # 1.
    if sources and is_reshape(node, root):
        before, batch = sources[0]
        return _slower_after_reshape(before, batch, value, axis, rows)
    # 2. Along another axis than the batch, a repetition leaves the rows as they are (6).
    has_more_rows = all(batch.rows < rows for batch in axes_read)
    if operation in (*_TILES, "repeat_interleave") and has_more_rows:
        are_neighbours = operation == "repeat_interleave"
        return _slower_after_repetition(axes_read, axis, 1 if are_neighbours else rows)
    # 3. Along another axis, a concatenation leaves the rows as well (6).
    is_along_batch = all(batch.axis == axis for batch in axes_read)
    if operation in _CATS and has_more_rows and is_along_batch:
        lie_whole_batches_apart = all(batch.slower == batch.rows for batch in axes_read)
        return rows if lie_whole_batches_apart else None
    # 4.
    as_many_rows = {batch.slower for batch in axes_read if batch.rows == rows}
    if not as_many_rows and len(sources) == 1 and _may_rearrange(node, root):
        before, batch = sources[0]
        return _slower_after_layer(node, root, before, batch, BatchAxis(axis, rows))
    # 5. The index itself may have any order, so it does not count.
    if any(_is_index(tensor) for tensor, _ in sources):
        known = as_many_rows - {None}
        as_many_rows = known or _slower_of_earlier_rows(node, rows)
    # 6.
    return as_many_rows.pop() if len(as_many_rows) == 1 else None


def _slower_after_repetition(axes_read: list[BatchAxis], axis: int, slower: int) -> int | None:
    """Return the `BatchAxis.slower` of repeated rows, None unless each was a sample of its own.

    Args:
        axes_read: the batch axes of the values that are repeated.
        axis: along which they are repeated.
        slower: of the result, if each row was a sample.
    """
    was_plain = bool(axes_read) and all(batch == BatchAxis(axis) for batch in axes_read)
    return slower if was_plain else None


def _is_index(value: Tensor) -> bool:
    """Return whether a tensor is of integers, which may name rows."""
    return not value.is_floating_point() and value.dtype != torch.bool


def _slower_of_earlier_rows(node: fx.Node, rows: int) -> set[int | None]:
    """Return each known `BatchAxis.slower` of the earlier values with so many rows a sample."""
    found: set[int | None] = set()
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        batch = facts(earlier).batch
        if isinstance(batch, BatchAxis) and batch.rows == rows and batch.slower is not None:
            found.add(batch.slower)
    return found


def _slower_after_reshape(
    before: Tensor, batch: BatchAxis, value: Tensor, axis: int, rows: int
) -> int | None:
    """Return the `BatchAxis.slower` of a reshaped value, None if its samples lie otherwise.

    From (N, B, C) to (N * B, C), with N rows of each sample, neighbouring samples stay C values
    apart. That is one row of the result, so all N rows lie whole batches apart.

    Args:
        before: the value that is reshaped.
        batch: its batch axis.
        value: the result.
        axis: its batch axis.
        rows: of each sample on that axis.
    """
    if before.numel() != value.numel() or batch.slower is None:
        return None
    # The distance of two neighbouring samples, counted in values. A reshape leaves it as it is.
    faster_before = batch.rows // batch.slower
    values_in_row_before = math.prod(before.shape[batch.axis + 1 :])
    distance = faster_before * values_in_row_before
    values_in_row = math.prod(value.shape[axis + 1 :])
    # So many rows of one sample are neighbours in the result, if samples begin with a row.
    faster, rest = divmod(distance, values_in_row)
    if rest or not faster or rows % faster:
        return None
    return rows // faster


def _may_rearrange(node: fx.Node, root: nn.Module) -> bool:
    """Return whether a node calls a layer that has no tensors, so that it may be a reshape."""
    if is_added(node):
        return False
    layer = called_module(node, root)
    if layer is None or has_tensors(layer):
        return False
    return not any(layer.children())


def _slower_after_layer(
    node: fx.Node, root: nn.Module, before: Tensor, batch: BatchAxis, after: BatchAxis
) -> int | None:
    """Return the `BatchAxis.slower` of what a layer returns, None if it mixes the samples.

    Args:
        node: calls the layer with one tensor.
        root: the model.
        before: the tensor.
        batch: its batch axis.
        after: the batch axis of the result, with its number of rows.
    """
    if batch.slower is None:
        return None
    layer = root.get_submodule(str(node.target))
    with unset_fake_temporarily(), torch.no_grad():
        # A tensor of the same shape, each value of which is the number of its sample. What the
        # layer makes of it shows where the samples have gone.
        num_rows = before.shape[batch.axis]
        shape_along_batch = [1] * before.ndim
        shape_along_batch[batch.axis] = num_rows
        numbers = _numbers_of_samples(num_rows, batch).view(shape_along_batch)
        samples = numbers.expand(before.shape).contiguous()
        args = fx.node.map_arg(node.args, lambda _: samples)
        try:
            # No call of the layer, which would run its hooks on these numbers.
            result = layer.forward(*args)
            rows = result.movedim(after.axis, 0).flatten(1)
        except Exception:
            return None  # it does not run on such numbers, or returns no such tensor
        return _slower_of_numbers(rows, after)


def _slower_of_numbers(numbers: Tensor, batch: BatchAxis) -> int | None:
    """Return the `BatchAxis.slower` of rows that hold the numbers of their samples, None if mixed.

    Args:
        numbers: (rows, values of a row).
        batch: the axis of the rows, with their number for each sample.
    """
    for slower in range(1, batch.rows + 1):
        if batch.rows % slower:
            continue
        order = BatchAxis(batch.axis, batch.rows, slower)
        expected = _numbers_of_samples(len(numbers), order)[:, None]
        if bool((numbers == expected).all()):
            return slower
    return None


def _numbers_of_samples(size: int, batch: BatchAxis) -> Tensor:
    """Return the number of the sample that each row of a batch axis belongs to, as floats.

    For two samples with two rows it is (0, 0, 1, 1) if `slower` is 1, and (0, 1, 0, 1) if it is 2.
    """
    faster = batch.rows // (batch.slower or 1)
    samples = size // batch.rows
    return (torch.arange(size) // faster % samples).float()


def _sources(node: fx.Node) -> Iterator[tuple[Tensor, BatchAxis]]:
    """Yield the tensors that a node reads and that have a batch axis, each with its axis."""
    for arg in node.all_input_nodes:
        value, batch = facts(arg).example, facts(arg).batch
        if isinstance(value, (tuple, list)):
            if _same_length(value, batch):
                yield from _parts_read(node, value, batch)
        elif isinstance(batch, BatchAxis) and not batch.alike:
            yield value, batch


def _parts_read(
    node: fx.Node, value: Sequence[Any], batch: Sequence[Any]
) -> Iterator[tuple[Tensor, BatchAxis]]:
    """Yield the parts of a tuple that a node reads and that have a batch axis, each with its axis.

    Args:
        node: reads the tuple, or one part of it.
        value: the tuple.
        batch: the batch axis of each part.
    """
    picked = _picked(node)
    for i, (part, axis) in enumerate(zip(value, batch, strict=True)):
        is_read = picked is None or picked == i
        if is_read and isinstance(axis, BatchAxis):
            yield part, axis


def _are_rows_alike(node: fx.Node, value: Tensor, axis: int) -> bool:
    """Return whether no row of a node's value tells the sample that it belongs to.

    A class token that is repeated for all samples is of this kind, and what layers make of it. So
    are zeros, to which the messages of a graph network are added.

    Args:
        node: computes the value, a tensor with several rows for each sample.
        value: whose order of rows is not known.
        axis: of the rows.
    """
    operation = name_of_target(node.target)
    if operation in _CONSTANTS:
        return True
    if operation in (*_TILES, "expand") and _is_one_row(node, value, axis):
        return True
    if operation.startswith("cum"):
        return False  # it numbers the rows
    read = [facts(arg).batch for arg in node.all_input_nodes if facts(arg).batch is not None]
    return bool(read) and all(isinstance(each, BatchAxis) and each.alike for each in read)


def _is_one_row(node: fx.Node, value: Tensor, axis: int) -> bool:
    """Return whether the value of a node repeats one row along an axis."""
    row = facts(node.all_input_nodes[0]).example
    if not isinstance(row, Tensor):
        return False
    # New axes come before those of the row.
    own_axis = axis - (value.ndim - row.ndim)
    return own_axis < 0 or row.shape[own_axis] == 1


def _picked(node: fx.Node) -> int | None:
    """Return the index of the part of a tuple that a node takes; None if it takes more than one."""
    if name_of_target(node.target) != "getitem":
        return None
    index = node.args[1]
    return index if isinstance(index, int) else None


def _same_length(value: Any, other: Any) -> bool:
    return isinstance(other, (tuple, list)) and len(value) == len(other)
