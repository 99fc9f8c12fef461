"""Let an optimizer step on the parameters of one block, and leave no trace of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sffx.runtime.gradients import Gradients


def apply(optimizer: Optimizer, gradients: Gradients) -> None:
    """Let the optimizer step on these parameters only, and leave none of their gradients."""
    groups = optimizer.param_groups
    all_parameters = [group["params"] for group in groups]
    # An interrupt may come in the middle of a restore, and would leave the optimizer with the
    # parameters of one block. The second restore then completes the first.
    try:
        try:
            _step_on(optimizer, gradients)
        finally:
            _restore(optimizer, groups, all_parameters, gradients)
    finally:
        _restore(optimizer, groups, all_parameters, gradients)


def _step_on(optimizer: Optimizer, gradients: Gradients) -> None:
    """Step, with all other parameters hidden from the optimizer."""
    groups = optimizer.param_groups
    for group in groups:
        group["params"] = [p for p in group["params"] if p in gradients]
    optimizer.param_groups = [group for group in groups if group["params"]]
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
        # Torch calls these hooks when a backward pass sets .grad. Here nothing else calls them.
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
    optimizer.step()


def _restore(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    all_parameters: list[list[nn.Parameter]],
    gradients: Gradients,
) -> None:
    """Show the optimizer all its parameters again, without the gradients that it stepped on."""
    optimizer.param_groups = groups
    for group, parameters in zip(groups, all_parameters, strict=True):
        group["params"] = parameters
    for parameter in gradients:
        parameter.grad = None
    # Autocast caches casts of the parameters as they were before the step.
    torch.clear_autocast_cache()
