"""Models with the steps first: a layer that reads the batch as steps is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError


def recurrent(batch_first: bool = False) -> nn.Module:
    return nn.LSTM(6, 6, batch_first=batch_first)


def encoder(batch_first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first)


class Attention(nn.MultiheadAttention):
    """Attends to its own input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


def attention(batch_first: bool = False) -> nn.Module:
    return Attention(6, 2, batch_first=batch_first)


class Reads(nn.Module):
    """Classifies the mean over an axis of what a layer makes of a sequence."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(6, 6), layer, nn.Linear(6, 4)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.first(x).relu())
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y.mean(self.axis))


class BatchFirst(nn.Module):
    """The wrapper that the hint names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.transpose(0, 1))


LAYERS = [recurrent, encoder, attention]
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", LAYERS)
def test_a_model_with_the_steps_first_is_refused_by_the_name_of_the_layer(make):
    with pytest.raises(TraceError, match=r"since 'layer' reads the first axis as steps.*Hint:"):
        sffx.plan(Reads(make(), axis=0), "layer", X)


@pytest.mark.parametrize("make", LAYERS)
def test_the_wrapper_of_the_hint_is_cut(make):
    model = BatchFirst(Reads(make(), axis=0)).eval()
    net = sffx.transform(model, "layer", X, norm="none", check=False).eval()
    assert not any("steps" in note for note in net.plan.notes)
    assert len(net.plan) == 2
    net.readout.mode = "classifier"
    assert torch.allclose(net(X), model(X), atol=1e-6)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_that_mixes_the_samples_is_noted(make, batch_first):
    plan = sffx.plan(Reads(make(batch_first), axis=1), "layer", X)
    noted = [note for note in plan.notes if "'layer' reads the batch as the steps" in note]
    assert bool(noted) is not batch_first


def test_each_of_two_layers_with_the_steps_first_is_a_block():
    class Two(nn.Module):
        """Two recurrent layers."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.GRU(6, 8), nn.LSTM(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.a(x.transpose(0, 1))
            y, _ = self.b(y)
            return self.head(y[-1])

    model = Two()
    net = sffx.transform(model, "layer", X, norm="none")
    assert [block.modules for block in net.plan] == [("a",), ("b",)]
    assert torch.equal(net(X)[-1], model(X))


def test_a_parameter_that_a_layer_is_given_is_no_obstacle_to_an_early_exit():
    class Queries(nn.Module):
        """Attends from a learned query."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
            self.layer, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)
            self.query = nn.Parameter(torch.randn(1, 2, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            query = self.query.expand(x.shape[0], -1, -1)
            return self.head(self.last(self.layer(query, x, x)[0]).mean(1))

    net = sffx.transform(Queries(), "layer", X)
    assert sffx.EarlyExit(net, 0.9)(X).scores.shape == (3, 4)
