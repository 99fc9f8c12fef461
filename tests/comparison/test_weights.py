from __future__ import annotations

import pytest
import torch
from torch import nn

from sffx.comparison.weights import draw_constants


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
