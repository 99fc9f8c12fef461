"""A cut residual network and inputs for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import sffx
from tests import toys


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    torch.manual_seed(0)
    net = sffx.transform(toys.Residual(), "residual", torch.zeros(1, 3, 8, 8))
    net.train()
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    return net


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
