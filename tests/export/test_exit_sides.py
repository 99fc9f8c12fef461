"""Values that cross a cut with the batch on another axis than the first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.blocks import BatchAxis


class Order(nn.Module):
    """The order of the features, (C, B), which two blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        order = x.t().argsort(0)
        y = self.a(x).relu() * order.sum(0)[:, None]
        y = self.b(y).relu() * order.sum(0)[:, None]
        return self.head(y)


def test_samples_cannot_leave_a_value_whose_first_axis_is_not_the_batch():
    net = sffx.transform(Order(), ["mul", "mul_1"], torch.zeros(1, 6))
    sides = {value.name: value.batch for value in net.plan.blocks[0].gives}
    assert sides["argsort"] == BatchAxis(1)
    with pytest.raises(sffx.InputError, match="'argsort' crosses a cut and depends on the number"):
        sffx.EarlyExit(net)
