"""The logits in what a plain model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sffx.tasks import Task


def logits_of(output: Any, task: Task, num_outputs: int | None = None) -> Any:
    """Return the logits in what a plain model returned, or all of it where there are none.

    What is called "logits" comes first, then what is called "out" and has axes of space, then the
    first float tensor of a shape that the task has. Probabilities do not count where the scores
    that they are made of are returned as well.

    Args:
        output: what the model returned.
        task: of the model.
        num_outputs: J where it is known.
    """
    fields = None if isinstance(output, Tensor) else fields_of(output)
    if fields is not None:
        name = name_of_logits(fields, _axes)
        if name:
            return logits_of(fields[name], task, num_outputs)
        output = tuple(fields.values())
    fitting = []
    for value in tree_leaves(output):
        is_of_floats = isinstance(value, Tensor) and value.is_floating_point()
        if is_of_floats and task.could_be_output(value.shape, num_outputs):
            fitting.append(value)
    for value in fitting:
        others = [other for other in fitting if other is not value]
        if not any(_are_probabilities(value, other) for other in others):
            return value
    return output


def fields_of(value: Any) -> Mapping[str, Any] | None:
    """Return the fields of a mapping or of a record of any kind by name, None of other values.

    A plain tuple has none. (`sffx.nested.parts_of` takes its items for parts.)
    """
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)  # of a named tuple
        return None if names is None else dict(zip(names, value, strict=True))
    # It may be a property, which `__dict__` does not hold.
    if hasattr(value, "logits"):
        return {**getattr(value, "__dict__", {}), "logits": value.logits}
    return getattr(value, "__dict__", None) or None


def name_of_logits(fields: Mapping[str, Any], axes: Callable[[Any], int]) -> str:
    """Return the name among some fields that says what the logits are, "" if none does.

    Args:
        fields: the values by name.
        axes: returns the number of axes of a value, 0 of what is no tensor.
    """
    if fields.get("logits") is not None:
        return "logits"
    return "out" if axes(fields.get("out")) > 3 else ""


def _axes(value: Any) -> int:
    return value.ndim if isinstance(value, Tensor) else 0


def _are_probabilities(value: Tensor, logits: Tensor) -> bool:
    """Return whether a value is what a softmax or a sigmoid makes of some logits."""
    if value.ndim < 2 or value.shape != logits.shape or value.dtype != logits.dtype:
        return False
    possible = [logits.sigmoid()]
    # Classes are axis 1 of (B, J) and (B, J, H, W), and the last axis of tokens, (B, T, J).
    for axis in {1, value.ndim - 1}:
        possible += [logits.softmax(axis), logits.log_softmax(axis)]
    return any(torch.allclose(value, each) for each in possible)
