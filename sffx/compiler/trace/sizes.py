"""Decisions that a forward takes by the sizes of its input, and whether another size changes them.

`if x.shape[-1] % 8` and `int(x.shape[2] / 4)` are settled by the example: a graph holds
the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.compiler.facts import facts

SETTLED_BY_SIZE = (
    "the forward branches on sizes of its input, or computes with them, as for the example alone: "
    "at another size the cut model may compute something else than the model"
)


def reads_a_size(node: fx.Node) -> bool:
    """Whether a node's value, a number or a truth value, is made from the size of an axis."""
    ahead = [node]
    while ahead:
        each = ahead.pop()
        value = facts(each).example
        if isinstance(value, Tensor):
            continue
        if isinstance(value, torch.Size) or each.target == "size":
            return True
        ahead += each.all_input_nodes
    return False


def depends_on_size(
    settled: list[Any],
    arguments: dict[str, Any],
    mode: FakeTensorMode,
    runs: Callable[[dict[str, Any]], bool],
    settle_again: Callable[[dict[str, Any]], list[Any] | None],
) -> bool:
    """Whether what a trace has settled is otherwise at the first other size that the model takes.

    Args:
        settled: outcomes, in order.
        arguments: of the trace.
        mode: in which the fake tensors live.
        runs: whether the model runs with other arguments.
        settle_again: traces with other arguments, and returns the outcomes.
    """
    if not settled:
        return False
    for changed in _other_arguments(arguments, mode):
        if runs(changed):
            return settle_again(changed) != settled
    return False


def _other_arguments(arguments: dict[str, Any], mode: FakeTensorMode) -> Iterator[dict[str, Any]]:
    """Yield the arguments with images or sequences of other sizes, all inputs changed alike."""
    for resized in (lambda size: size + 1, lambda size: 2 * size, lambda size: size // 2):
        for axis_of_length in (1, 2):
            changed = dict(arguments)
            is_changed = False
            for name, value in arguments.items():
                axes = _sizes(value, axis_of_length) if isinstance(value, Tensor) else []
                if axes:
                    shape = list(value.shape)
                    for axis in axes:
                        shape[axis] = resized(shape[axis])
                    with mode:
                        changed[name] = torch.empty(shape, dtype=value.dtype, device=value.device)
                    is_changed = True
            if is_changed:
                yield changed


def _sizes(value: Tensor, axis_of_length: int) -> list[int]:
    """Return the axes that are heights, widths or lengths.

    Args:
        value: an image (B, C, H, W), tokens (B, T), a sequence (B, T, C) or a signal (B, C, T).
        axis_of_length: of a sequence or a signal, which cannot be told apart.
    """
    if value.ndim > 3:
        return list(range(2, value.ndim))
    if value.ndim == 3:
        return [axis_of_length]
    return [1] if value.ndim == 2 and not value.is_floating_point() else []
