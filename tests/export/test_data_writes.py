"""A forward that assigns the data of a tensor: refused before an exporter gets to see it.

Of a weight, torch's exporter would end the process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx


class Sign(nn.Module):
    """The sign with the gradient of the identity."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        y.data = y.data.sign()
        return y


class BinaryConv(nn.Conv2d):
    """A convolution with the signs of its weights, as binarized networks write it."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.sign()
        return super().forward(x)


class StraightThrough(nn.Module):
    """What the hint says to write."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        return y + (y.sign() - y).detach()


def net_with(layer: nn.Module, activation: nn.Module) -> sffx.net.CutModel:
    model = nn.Sequential(layer, activation, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    return sffx.transform(model, "layer", torch.zeros(2, 3, 6, 6), check=False)


@pytest.mark.parametrize("export", [sffx.export_onnx, sffx.export_program])
@pytest.mark.parametrize(
    ("layer", "activation", "module"),
    [(nn.Conv2d(3, 4, 3), Sign(), "1"), (BinaryConv(3, 4, 3), nn.ReLU(), "0")],
)
def test_an_assignment_to_data_is_refused_by_the_name_of_the_module(
    tmp_path, export, layer, activation, module
):
    path = tmp_path / "net"
    path.write_text("what was there before")
    with pytest.raises(sffx.ExportError, match=f"module '{module}'.* assigns the data .*Hint"):
        export(net_with(layer, activation), path)
    assert path.read_text() == "what was there before"


@pytest.mark.parametrize("export", [sffx.export_onnx, sffx.export_program])
def test_what_the_hint_says_is_exported(tmp_path, export):
    path = tmp_path / "net"
    export(net_with(nn.Conv2d(3, 4, 3), StraightThrough()), path)  # compares with torch
    assert path.exists()
