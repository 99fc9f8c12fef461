"""The state of an optimizer by name: it comes back as it was, and reading it changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sffx.errors import InputError
from sffx.runtime.pipeline.optimizer_state import load_by_name, state_by_name

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1
    ),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "rate in a tensor": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1)),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
}


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])


def step(module: nn.Module, optimizer: Optimizer, names: str) -> None:
    """Step with gradients for some layers only, and none left."""
    for name, parameter in module.named_parameters():
        has_gradient = name[0] in names
        parameter.grad = torch.full_like(parameter, 0.5) + parameter if has_gradient else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def values(module: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Return all weights, and all state by the position of the parameter."""
    parameters = list(module.parameters())
    states = [dict(optimizer.state[p]) if p in optimizer.state else None for p in parameters]
    return copy.deepcopy([list(map(Tensor.detach, parameters)), states, optimizer.param_groups])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [[], ["0"], ["01", "01"], ["012"]])
def test_reading_changes_nothing_and_loading_brings_all_back(kind, before):
    module = made()
    optimizer = OPTIMIZERS[kind](module.parameters())
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for names in before:
        step(module, optimizer, names)
    expected = values(module, optimizer)
    state = copy.deepcopy(state_by_name(module, optimizer))
    torch.testing.assert_close(values(module, optimizer), expected, rtol=0, atol=0)
    assert len(steps) == len(before)

    other = made()
    other.load_state_dict(module.state_dict())
    loaded = OPTIMIZERS[kind](other.parameters())
    assert set(state_by_name(other, loaded)) == set(state)
    load_by_name(other, loaded, state)
    # Both go on alike, the layers without a state included.
    for names in ("01", "012", "12"):
        step(module, optimizer, names)
        step(other, loaded, names)
    torch.testing.assert_close(values(other, loaded), values(module, optimizer), rtol=0, atol=0)


def test_a_state_is_loaded_over_a_parameter_that_has_none_yet():
    module = made()
    optimizer = OPTIMIZERS["AdamW"](module.parameters())
    step(module, optimizer, "012")
    other = made()
    loaded = OPTIMIZERS["AdamW"](other.parameters())
    step(other, loaded, "0")
    load_by_name(other, loaded, state_by_name(module, optimizer))
    for own, there in zip(other.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(loaded.state[own], optimizer.state[there], rtol=0, atol=0)


def test_an_optimizer_for_each_layer_has_the_state_of_one_for_all():
    module, other = made(), made()
    together = OPTIMIZERS["AdamW"](module.parameters())
    apart = {str(i): OPTIMIZERS["AdamW"](layer.parameters()) for i, layer in enumerate(other)}
    step(module, together, "01")
    for own in (apart["0"], apart["1"]):
        step(other, own, "01")
    expected = state_by_name(module, together)
    torch.testing.assert_close(state_by_name(other, apart), expected, rtol=0, atol=0)
    fresh = {str(i): OPTIMIZERS["AdamW"](layer.parameters()) for i, layer in enumerate(other)}
    load_by_name(other, fresh, expected)
    torch.testing.assert_close(state_by_name(other, fresh), expected, rtol=0, atol=0)
    assert state_by_name(module, None) == {}
    with pytest.raises(InputError, match="the optimizer is a str"):
        state_by_name(module, {"0": "sgd"})
