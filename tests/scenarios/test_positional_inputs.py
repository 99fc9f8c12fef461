"""Inputs that have no name in a call: of `*args`, and of parameters before a slash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def of(self, x: Tensor, shift: Any = 0) -> Tensor:
        return self.c((self.b(self.a(x).relu()) + shift).relu())


class Star(Layers):
    def forward(self, *x: Tensor) -> Tensor:
        return self.of(x[0])


class TwoOfStar(Layers):
    def forward(self, *x: Tensor) -> Tensor:
        return self.of(x[0], x[1])


class Slash(Layers):
    def forward(self, x: Tensor, /, shift: Any = 0) -> Tensor:
        return self.of(x, shift)


class Named(Layers):
    def forward(self, x: Tensor, *, shift: Any = 0) -> Tensor:
        return self.of(x, shift)


X, SHIFT = torch.randn(4, 5), torch.randn(4, 6)
CASES = {
    "star": (Star, X),
    "star of two": (TwoOfStar, (X, SHIFT)),
    "slash": (Slash, X),
    "slash and a name": (Slash, (X, SHIFT)),
    "names": (Named, {"x": X, "shift": SHIFT}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_such_a_model_cuts_it_again(name: str, tmp_path: Path) -> None:
    kind, x = CASES[name]
    net = sffx.transform(kind(), "layer", x)
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    again = sffx.load_checkpoint(tmp_path / "net.pt").net(kind())
    assert [each.name for each in again.plan.inputs] == [each.name for each in net.plan.inputs]
    assert torch.equal(sffx.block_scores(again, x), sffx.block_scores(net, x))
