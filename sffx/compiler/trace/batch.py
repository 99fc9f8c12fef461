"""Numbers that depend on the batch size, and where a graph would freeze one.

A trace knows each value at two batch sizes. A number that differs between them depends on the
batch, and so does whatever is made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from torch import fx

from sffx.compiler.facts import facts
from sffx.tensors import holds_tensor

FROZEN_BATCH = (
    "the batch size is read as a plain number, which a graph would freeze; "
    "x.shape[0] in sizes and products is not"
)

# A condition with one outcome at all of these sizes is taken to have it at every size.
_SMALL_SIZES = range(1, 257)
_POWERS_OF_TWO = [2**k for k in range(9, 21)]
_BATCH_SIZES = (*_SMALL_SIZES, *_POWERS_OF_TWO, 10**6)

# Of the sizes that change an outcome, so many are tried on the model itself.
_MOST_TRIED = 3


def length(node: fx.Node) -> int:
    """Return the length of a node's value, for a graph that will hold it as a plain number.

    Raises:
        RuntimeError: it depends on the batch size.
    """
    if has_length_of_batch(node):
        raise RuntimeError(FROZEN_BATCH)
    return len(facts(node).example)


def has_length_of_batch(node: fx.Node) -> bool:
    """Return whether the length of a node's value depends on the batch size."""
    return len(facts(node).example) != len(facts(node).other)


def depends_on_batch(node: fx.Node, value: Any, other: Any) -> bool:
    """Return whether a node's value holds no tensor, and differs with the batch.

    What is made from such a number counts as well, even if it is the same at both batch sizes.
    """
    if isinstance(value, (tuple, list)):
        return not holds_tensor(value) and value != other
    if not isinstance(value, (int, float)):
        return False
    if value != other:
        return True
    of_batch = [arg for arg in node.all_input_nodes if facts(arg).of_batch]
    # Of a shape (B, C), a node may take the number of channels.
    picks_a_part = any(isinstance(facts(arg).example, (tuple, list)) for arg in of_batch)
    return bool(of_batch) and not picks_a_part


def is_settled(condition: fx.Node, sizes: tuple[int, int], takes: Callable[[int], bool]) -> bool:
    """Return whether a condition has the same outcome at every batch size that the model takes.

    Args:
        condition: a node with a truth value.
        sizes: of the two batches of the trace.
        takes: whether the model runs with a batch of some size.
    """
    others = _sizes_that_differ(condition, sizes)
    # A model that asserts that the size is even runs with no odd one.
    return others is not None and not any(takes(size) for size in others[:_MOST_TRIED])


def differs_at_one(condition: fx.Node, sizes: tuple[int, int]) -> bool:
    """Return whether a condition has another outcome for a batch of one sample, and only there.

    Args:
        condition: a node with a truth value.
        sizes: of the two batches of the trace.
    """
    return _sizes_that_differ(condition, sizes) == [1]


def _sizes_that_differ(condition: fx.Node, sizes: tuple[int, int]) -> list[int] | None:
    """Return the batch sizes at which a condition has another outcome, None if it is not known."""
    record = facts(condition)
    reads_batch = any(facts(arg).of_batch for arg in condition.all_input_nodes)
    if not record.of_batch and not reads_batch:
        return []
    outcome = bool(record.example)
    others = []
    for size in _BATCH_SIZES:
        try:
            if bool(_at_size(condition, size, sizes)) != outcome:
                others.append(size)
        except _Unknown:
            return None
    return others


class _Unknown(Exception):
    """What a number is at another batch size cannot be told."""


def _at_size(node: fx.Node, size: int, sizes: tuple[int, int]) -> Any:
    """Return the value of a node without tensors at another batch size.

    Raises:
        _Unknown: it cannot be told.
    """
    record = facts(node)
    if any(holds_tensor(facts(arg).example) for arg in node.all_input_nodes):
        return _on_a_line(record.example, record.other, size, sizes)
    args: Any = fx.node.map_arg(node.args, lambda arg: _at_size(arg, size, sizes))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda arg: _at_size(arg, size, sizes))
    target: Any = node.target
    try:
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
    except Exception as cause:
        raise _Unknown from cause
    return record.example


def _on_a_line(value: Any, other: Any, size: int, sizes: tuple[int, int]) -> Any:
    """Return a size, or a tuple of sizes, on the line through its values at two batch sizes."""
    if isinstance(value, (tuple, list)):
        parts = zip(value, other, strict=True)
        return tuple(_on_a_line(one, two, size, sizes) for one, two in parts)
    if value == other:
        return value
    if type(value) is not int or type(other) is not int:
        raise _Unknown
    slope = Fraction(value - other, sizes[0] - sizes[1])
    return value + slope * (size - sizes[0])
