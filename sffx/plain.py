"""The logits in what a plain model returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


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
