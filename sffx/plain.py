"""The logits in what a plain model returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sffx.blocks import BlockPlan


def logits_of(output: Any, plan: BlockPlan) -> Any:
    """Return the logits in what a plain model returned, cut by a plan.

    What is called "logits" comes first, then the first float tensor of shape (B, J), or of the
    shape of another task. Probabilities do not count where what they are made of is returned as
    well.
    """
    if isinstance(output, Mapping) and "logits" in output:
        return logits_of(output["logits"], plan)
    if not isinstance(output, Tensor) and hasattr(output, "logits"):
        return logits_of(output.logits, plan)
    if is_dataclass(output):
        output = list(vars(output).values())
    found = []
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and _could_be_logits(value, plan):
            found.append(value)
    for value in found:
        if not any(_are_probabilities(value, other) for other in found if other is not value):
            return value
    return output


def _are_probabilities(value: Tensor, logits: Tensor) -> bool:
    """Return whether a value is what a softmax or a sigmoid makes of other values."""
    if value.ndim < 2 or value.shape != logits.shape or value.dtype != logits.dtype:
        return False
    made = (logits.softmax(1), logits.log_softmax(1), logits.sigmoid())
    return any(torch.allclose(value, each) for each in made)


def _could_be_logits(value: Tensor, plan: BlockPlan) -> bool:
    is_of_shape = plan.task.could_be_output(value.shape, plan.num_classes)
    return is_of_shape and value.is_floating_point()
