"""Calls of a plain model: its arguments as a caller writes them, and the logits that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def call_arguments(model: nn.Module, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return arguments as a caller writes them: the leading ones by position, the others by name.

    Args:
        model: that is called.
        values: its arguments by name.
    """
    rest = dict(values)
    positional = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        by_position = (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if name not in rest or parameter.kind not in by_position:
            break
        positional.append(rest.pop(name))
    return positional, rest


def logits_of(output: Any, num_classes: int) -> Any:
    """Return the logits in what a plain model returned.

    What is called "logits" comes first, then the first float tensor of shape (B, J).
    """
    if isinstance(output, Mapping) and "logits" in output:
        return logits_of(output["logits"], num_classes)
    if not isinstance(output, Tensor) and hasattr(output, "logits"):
        return logits_of(output.logits, num_classes)
    if is_dataclass(output):
        output = list(vars(output).values())
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and _could_be_logits(value, num_classes):
            return value
    return output


def _could_be_logits(value: Tensor, num_classes: int) -> bool:
    return value.ndim == 2 and value.shape[1] == num_classes and value.is_floating_point()
