"""The batch axis: which numbers depend on the batch size, and where a graph would freeze it.

A trace runs on examples of batch size `TRACE_BATCH`, a number that nothing else in a model is
likely to be. So a number that is a multiple of it stands for the batch.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from sffx.compiler.examples import TRACE_BATCH
from sffx.compiler.facts import facts

FROZEN_BATCH = (
    "the batch size is read as a plain number, which a graph would freeze; "
    "x.shape[0], without len() or int(), is not"
)

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)

# A comparison with one outcome at all of these sizes is taken to have it at every size.
_BATCH_SIZES = (TRACE_BATCH, 1, 2, 3, 4, 10**6)


def length(value: Any) -> int:
    """Return the length of a value, for a graph that will hold it as a plain number.

    Raises:
        RuntimeError: it is the batch size.
    """
    number = len(value)
    # A tuple of this length is not suspect: only the first axis of a tensor is the batch.
    if isinstance(value, Tensor) and number == TRACE_BATCH:
        raise RuntimeError(FROZEN_BATCH)
    return number


def depends_on_batch(node: fx.Node, value: Any) -> bool:
    """Whether a node's value is a number that is a multiple of the batch size, or made from one."""
    if not isinstance(value, (int, float)):
        return False
    return _is_multiple(value) or any(facts(arg).of_batch for arg in node.all_input_nodes)


def is_settled(condition: fx.Node) -> bool:
    """Whether a condition has the same outcome at every batch size.

    1. It reads no batch size.
    2. It compares multiples of the batch size, and the outcome is the same at other sizes.
    """
    if condition.target not in _COMPARISONS:
        return not facts(condition).of_batch
    for arg in condition.all_input_nodes:
        # A number made from a batch size, as B // 2, has an unknown value at another size.
        if facts(arg).of_batch and not _is_multiple(facts(arg).example):
            return False
    outcomes = {_outcome(condition, size) for size in _BATCH_SIZES}
    return len(outcomes) == 1


def _outcome(comparison: fx.Node, batch_size: int) -> bool:
    sides: Any = fx.node.map_arg(
        comparison.args, lambda node: _at_batch_size(facts(node).example, batch_size)
    )
    compare: Any = comparison.target
    return bool(compare(*sides))


def _at_batch_size(value: Any, batch_size: int) -> Any:
    """Return a size, or a tuple of sizes, as it would be at another batch size."""
    if isinstance(value, (tuple, list)):
        return tuple(_at_batch_size(size, batch_size) for size in value)
    if _is_multiple(value):
        return value / TRACE_BATCH * batch_size
    return value


def _is_multiple(value: Any) -> bool:
    return isinstance(value, (int, float)) and value != 0 and value % TRACE_BATCH == 0
