"""Weights from the meta device: what a layer does not draw counts as missing, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError
from sffx.runtime.pipeline.checks import require_values
from sffx.runtime.pipeline.ownership import materialize, tensors_of


class Scaled(nn.Module):
    """Draws its weight, in one of several ways, and may forget its buffers."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("order", torch.arange(4))
        self.register_buffer("flags", torch.ones(4, dtype=torch.bool))
        self.register_buffer("nothing", torch.ones(0))
        self.draw = draw

    def reset_parameters(self) -> None:
        if self.draw == "through data":
            self.weight.data.normal_()
            self.scale.data.fill_(1)
            self.order.data.copy_(torch.arange(4))
            self.flags.data.fill_(False)
        if self.draw == "anew":
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.scale, self.order = torch.ones(4), torch.arange(4)
            self.flags = torch.ones(4, dtype=torch.bool)
        if self.draw in ("all", "weight"):
            nn.init.normal_(self.weight)
        if self.draw == "all":
            self.scale.fill_(1)
            self.order.copy_(torch.arange(4))
            self.flags.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight * self.scale)[:, self.order] * self.flags


def from_meta(draw: str) -> tuple[Any, list[str], Any]:
    with torch.device("meta"):
        model = nn.Sequential(Scaled(draw), nn.ReLU(), nn.Linear(4, 3))
    net = sffx.transform(model, ["_1"], torch.zeros(2, 4))
    parts = ["block_0", "head_0", "classifier"]
    return net, parts, materialize(net, parts, torch.device("cpu"))


@pytest.mark.parametrize("draw", ["all", "anew", "through data"])
def test_drawn_tensors_have_values(draw):
    net, parts, empty = from_meta(draw)
    assert not empty
    assert not any(tensor.is_meta for tensor in tensors_of(net, parts).values())
    require_values(net, parts, empty)


@pytest.mark.parametrize(
    ("draw", "missing"),
    [("weight", {"scale", "order", "flags"}), ("nothing", {"weight", "scale", "order", "flags"})],
)
def test_forgotten_tensors_are_missing_until_they_are_set(draw, missing):
    net, parts, empty = from_meta(draw)
    assert {name.rpartition(".")[2] for name in empty} == missing
    with pytest.raises(InputError, match=r"block_0\S* and . other tensors have no values"):
        require_values(net, parts, empty)
    for name, each in empty.items():
        if name.endswith("scale"):
            each.tensor.data.fill_(1)
        else:
            each.tensor.detach().copy_(torch.ones(()))
    require_values(net, parts, empty)
