"""The state of optimizers by names of the cut model, for distributed checkpoints.

A parameter without a gradient so far has no state. But a checkpoint needs the same entries before
and after training, or it does not load. So each parameter gets entries, and a mark says whether
they count. Torch's own functions step on such parameters, so that Adam counts one step too many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from sffx.errors import InputError
from sffx.runtime.step import Optimizers

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def state_by_name(module: nn.Module, optimizers: Optimizers | None) -> dict[str, Any]:
    """Return the state of optimizers, flat, by the names of a module's parameters.

    The optimizers stay as they are.

    Args:
        module: whose parameters the optimizers have, each parameter in one.
        optimizers: in any state: one, a mapping with one for each block, or None for none.

    Raises:
        InputError: they are no optimizers.
    """
    state: dict[str, Any] = {}
    for optimizer in _each(optimizers):
        state.update(_state_of(module, optimizer))
    return state


def load_by_name(module: nn.Module, optimizers: Optimizers | None, state: dict[str, Any]) -> None:
    """Load what `state_by_name` returned, perhaps for a module with more parameters.

    Raises:
        InputError: they are no optimizers.
    """
    for optimizer in _each(optimizers):
        _load(module, optimizer, state)


def _each(optimizers: Any) -> list[Optimizer]:
    """Return each optimizer once."""
    if optimizers is None:
        return []
    several = list(optimizers.values()) if isinstance(optimizers, Mapping) else [optimizers]
    for each in several:
        if not isinstance(each, Optimizer):
            raise InputError(
                f"the optimizer is a {type(each).__name__}. "
                "Hint: pass what train was given: an optimizer, one for each block by name, or None"
            )
    return list(dict.fromkeys(several))


def _state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer by name, with a mark for each of its parameters."""
    without_state = _without_state(optimizer)
    with _all_have_state(optimizer):
        state: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_FLAT)
    for name, parameter in _own(module, optimizer).items():
        state[_mark(name)] = torch.tensor(parameter not in without_state)
    return state


def _load(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, and remove what a mark says does not count."""
    with _all_have_state(optimizer):
        set_optimizer_state_dict(module, optimizer, state, options=_FLAT)
        loaded = dict(optimizer.state)
    # `_all_have_state` has removed states that were loaded as well, so all are set again.
    for name, parameter in _own(module, optimizer).items():
        optimizer.state.pop(parameter, None)
        if parameter in loaded and state.get(_mark(name), True):
            optimizer.state[parameter] = loaded[parameter]


def _mark(name: str) -> str:
    """Return the key of the entry that says whether a parameter has a state."""
    return f"state.{name}.has_state"


def _own(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by their names in a module."""
    held = set(_parameters(optimizer))
    return {name: each for name, each in module.named_parameters() if each in held}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _without_state(optimizer: Optimizer) -> set[Tensor]:
    return {each for each in _parameters(optimizer) if not optimizer.state.get(each)}


@contextmanager
def _all_have_state(optimizer: Optimizer) -> Iterator[None]:
    """Give each parameter a state inside the context."""
    parameters = _parameters(optimizer)
    without_state = _without_state(optimizer)
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        # Torch steps on an optimizer without gradients, and with its hooks, so gradients stay.
        parameter.grad = torch.zeros_like(parameter) if parameter in without_state else None
    try:
        if without_state:
            _step_at_rate_zero(optimizer)
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for parameter in without_state:
            optimizer.state.pop(parameter, None)


def _step_at_rate_zero(optimizer: Optimizer) -> None:
    """Let an optimizer make the state of the parameters with a gradient, and change none of them.

    Nobody's hooks run, since they may do something at each step, such as averaging weights.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    before = optimizer._optimizer_step_pre_hooks
    after = optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks = OrderedDict()
    optimizer._optimizer_step_post_hooks = OrderedDict()
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * 0
    try:
        # Not the step of the object, which a scheduler has replaced to count its calls.
        type(optimizer).step(optimizer)
    finally:
        optimizer._optimizer_step_pre_hooks = before
        optimizer._optimizer_step_post_hooks = after
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if "lr" in group:
                group["lr"] = rate
