"""Let an optimizer step on the parameters of one block, and leave no trace of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sffx.runtime.gradients import Gradients


class Updates:
    """The steps of one optimizer on one block after the other.

    Args:
        optimizer: over the parameters of several blocks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # Looked up by parameter, so that a block does not go through the groups of all others.
        self._places: dict[nn.Parameter, int] = {}
        for place, group in enumerate(optimizer.param_groups):
            self._places.update(dict.fromkeys(group["params"], place))

    def apply(self, gradients: Gradients) -> None:
        """Let the optimizer step on these parameters only, and leave none of their gradients."""
        groups = self._optimizer.param_groups
        places = {self._places[p] for p in gradients if p in self._places}
        own = [groups[place] for place in sorted(places)]
        all_parameters = [group["params"] for group in own]
        # An interrupt may come in the middle of a restore, and would leave the optimizer with the
        # parameters of one block. The second restore then completes the first.
        try:
            try:
                _step_on(self._optimizer, own, gradients)
            finally:
                _restore(self._optimizer, groups, own, all_parameters, gradients)
        finally:
            _restore(self._optimizer, groups, own, all_parameters, gradients)


def _step_on(optimizer: Optimizer, own: list[dict[str, Any]], gradients: Gradients) -> None:
    """Step on the groups of a block, with all other parameters hidden from the optimizer."""
    for group in own:
        group["params"] = [p for p in group["params"] if p in gradients]
    optimizer.param_groups = own
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
        # Torch calls these hooks when a backward pass sets .grad. Here nothing else calls them.
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
    optimizer.step()


def _restore(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    own: list[dict[str, Any]],
    all_parameters: list[list[nn.Parameter]],
    gradients: Gradients,
) -> None:
    """Show the optimizer all its parameters again, without the gradients that it stepped on."""
    optimizer.param_groups = groups
    for group, parameters in zip(own, all_parameters, strict=True):
        group["params"] = parameters
    for parameter in gradients:
        parameter.grad = None
    # Autocast caches casts of the parameters as they were before the step.
    torch.clear_autocast_cache()
