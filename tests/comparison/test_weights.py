from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sffx.comparison.weights import TELLING, draw_constants, spread, telling_weights


class _Holds(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


@pytest.mark.parametrize(
    ("shape", "start"),
    [((), 0.0), ((1,), 0.0), ((5,), 0.0), ((5,), 1.0), ((4, 1), 1.0), ((4, 3, 2), 0.0)],
)
def test_parameters_that_start_as_constants_are_drawn(shape, start):
    module = _Holds(torch.full(shape, start))
    draw_constants(module)
    assert module.weight.shape == shape
    assert (module.weight != start).all()


@pytest.mark.parametrize("start", [[0.0, 1.0], [2.0], 2.0])
def test_parameters_that_do_not_and_single_numbers_are_kept(start):
    value = torch.tensor(start)
    module = _Holds(value.clone())
    draw_constants(module)
    assert torch.equal(module.weight, value)


class _Narrow(nn.Module):
    """Its outputs hardly differ between samples while its weights are small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=2e-3)
            nn.init.normal_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_small_weights_are_doubled_until_outputs_tell():
    torch.manual_seed(0)
    model, x = _Narrow(), torch.randn(4, 6)
    assert spread(model(x)) < TELLING
    weights = telling_weights(model, lambda twin: twin(x))
    factors = set()
    for name in ("first.weight", "second.weight"):
        factors.add(float((weights[name] / model.get_parameter(name).detach()).mean()))
    assert len(factors) == 1
    assert factors <= {2.0, 4.0, 8.0}
    larger = torch.func.functional_call(model, weights, x)
    assert spread(larger) > TELLING


def test_weights_of_outputs_that_tell_stay():
    model, x = nn.Linear(6, 4), torch.randn(4, 6)
    assert telling_weights(model, lambda twin: twin(x)) == {}
