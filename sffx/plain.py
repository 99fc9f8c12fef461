"""The logits in what a plain model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sffx.tasks import Task


def logits_of(
    output: Any, task: Task, num_outputs: int | None = None, keys: Sequence[Any] = ()
) -> Any:
    """Return the logits in what a plain model returned, or all of it where there are none.

    What the keys lead to comes first. Then comes what is called "logits", then what is called "out"
    and has axes of space, then the first float tensor of a shape that the task has. Probabilities
    do not count where the scores that they are made of are returned as well.

    Args:
        output: what the model returned.
        task: of the model.
        num_outputs: J where it is known.
        keys: lead to the logits in what the model returns in train mode, () where they are not
            known. In eval mode it may return something else.
    """
    found = _value_at(output, keys)
    if isinstance(found, Tensor):
        return found
    fitting = values_that_fit(output, task, num_outputs)
    return fitting[0] if fitting else output


def values_that_fit(output: Any, task: Task, num_outputs: int | None = None) -> list[Tensor]:
    """Return the values that could be the logits in what a plain model returned.

    It is one where the model names its logits.

    Args:
        output: what the model returned.
        task: of the model.
        num_outputs: J where it is known.
    """
    fields = None if isinstance(output, Tensor) else fields_of(output)
    if fields is not None:
        name = name_of_logits(fields, _axes)
        if name:
            return values_that_fit(fields[name], task, num_outputs)
        output = tuple(fields.values())
    fitting = []
    for value in tree_leaves(output):
        is_of_floats = isinstance(value, Tensor) and value.is_floating_point()
        if is_of_floats and task.could_be_output(value.shape, num_outputs):
            fitting.append(value)
    return [value for value in fitting if not _are_probabilities_of_any(value, fitting)]


def _value_at(output: Any, keys: Sequence[Any]) -> Any:
    """Return the value that some keys lead to, None where there is none."""
    for key in keys:
        output = parts_by_key(output).get(key)
    return output


def parts_by_key(value: Any) -> Mapping[Any, Any]:
    """Return the parts of a mapping, a record, a tuple or a list; none of other values."""
    fields = fields_of(value)
    if fields is not None:
        return {**fields}
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else {}


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


def _are_probabilities_of_any(value: Tensor, others: Sequence[Tensor]) -> bool:
    """Return whether a value is the softmax or the sigmoid of another one."""
    return any(_are_probabilities(value, other) for other in others if other is not value)


def _are_probabilities(value: Tensor, logits: Tensor) -> bool:
    """Return whether a value is what a softmax or a sigmoid makes of some logits."""
    if value.ndim < 2 or value.shape != logits.shape or value.dtype != logits.dtype:
        return False
    possible = [logits.sigmoid()]
    # Classes are axis 1 of (B, J) and (B, J, H, W), and the last axis of tokens, (B, T, J).
    for axis in {1, value.ndim - 1}:
        possible += [logits.softmax(axis), logits.log_softmax(axis)]
    return any(torch.allclose(value, each) for each in possible)
