"""A prediction that needs values says what needs them, and which line of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError


class Part(nn.Module):
    """Two layers, and code between them that a trace cannot look into."""

    def __init__(self, code):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.code(self.first(x)))


def branches(x: Tensor) -> Tensor:
    return x * 2 if x.abs().sum() > 0 else x


def reads_a_number(x: Tensor) -> Tensor:
    return x / max(x.abs().max().item(), 1.0)


def selects(x: Tensor) -> Tensor:
    return x[(x[:, 0] > -1e9).nonzero()[:, 0]]


def leaves_torch(x: Tensor) -> Tensor:
    return x + float(x.detach().numpy().mean())


CODE = {
    branches: "a branch or a plain number",
    reads_a_number: "a branch or a plain number",
    selects: "a shape",
    leaves_torch: "code outside of torch",
}


@pytest.mark.parametrize("code", CODE)
def test_the_reason_and_the_line_are_told(code):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Part(code), nn.ReLU(), nn.Linear(8, 4))
    x = torch.zeros(1, 6)
    net = sffx.transform(model, "layer", x, check=False)
    words = rf"without values: {CODE[code]} .*test_values.py:\d+, in {code.__name__}"
    with pytest.raises(InputError, match=words):
        sffx.footprint(net, 8)
    with pytest.raises(InputError, match=words):
        sffx.plan(model, "memory(1 GiB, 8)", x)


def test_batch_norms_that_average_over_all_batches_are_counted():
    def model(momentum: float | None) -> nn.Module:
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU())
        end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        return nn.Sequential(*layers, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), *end)

    image = torch.zeros(1, 3, 8, 8)
    usual, averaged = (
        sffx.footprint(sffx.transform(model(momentum), "layer", image, check=False), 8)
        for momentum in (0.1, None)
    )
    assert averaged == usual
