"""The channel axis of a value holds the same number of channels at every size of the input."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.analyse import analyse
from sffx.compiler.trace.trace import trace
from sffx.errors import CutError, InputError

LENGTH, WIDTH = 10, 8


class Layers(nn.Module):
    """Calls functions and modules one after another, and a linear layer on the mean."""

    def __init__(self, *layers, first: nn.Module | None = None, width: int = WIDTH) -> None:
        super().__init__()
        self.first = first or nn.Linear(6, WIDTH)
        self.layers = layers
        self.parts = nn.ModuleList(each for each in layers if isinstance(each, nn.Module))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x.relu().mean(1))


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT, -1) @ x


def scores(x: Tensor) -> Tensor:
    """Return a matrix of two lengths, which holds no channels."""
    return (x @ x.mT).tanh()


class Turned(nn.Module):
    """Applies a module to (B, C, L)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


# Of a sequence (B, L, C), where L may be any length.
SEQUENCES = {
    "pool over channels": Layers(nn.MaxPool1d(3, 1, 1)),
    "pool to fewer channels": Layers(nn.AvgPool1d(2), width=WIDTH // 2),
    "adaptive pool": Layers(nn.AdaptiveAvgPool1d(4), width=4),
    "pool without a layer before it": Layers(
        nn.Linear(6, WIDTH), nn.AdaptiveAvgPool1d(3), first=nn.MaxPool1d(3, 1, 1), width=3
    ),
    "norm without weights": Layers(nn.InstanceNorm1d(LENGTH)),
    "norm over groups": Layers(lambda x: F.instance_norm(x)),
    "attention": Layers(Attends()),
    "turned pool": Layers(Turned(nn.MaxPool1d(3, 1, 1))),
    "turned convolution": Layers(Turned(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))),
    "turned norm": Layers(Turned(nn.BatchNorm1d(WIDTH))),
    "scores of attention": Layers(scores, lambda x: x.mean(-1, keepdim=True), nn.Linear(1, 8)),
    "mean over channels": Layers(lambda x: x.mean(-1), lambda x: x[..., None] * torch.ones(8)),
    "axes made and merged": Layers(lambda x: x.unflatten(-1, (2, -1)).relu().flatten(2)),
    "recurrent": Layers(nn.GRU(WIDTH, WIDTH, batch_first=True), operator.itemgetter(0)),
}


@pytest.mark.sampled(7)
@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize("name", SEQUENCES)
def test_heads_take_every_length_that_the_model_takes(name):
    model = SEQUENCES[name]
    example = torch.randn(2, LENGTH, 6)
    candidates = analyse(trace(model, example)).candidates
    net = sffx.transform(model, list(candidates), example, norm="none")
    for length in (LENGTH, 4, 17):
        x = torch.randn(3, length, 6)
        torch.testing.assert_close(net.eval()(x).shape, model.eval()(x).shape)
        sffx.local_loss(net.train(), x, torch.tensor([0, 1, 2])).backward()


def test_a_matrix_of_lengths_is_refused():
    model = SEQUENCES["scores of attention"]
    with pytest.raises(CutError, match=r"channel axis of its value, of shape \(60, 10, 10\), can"):
        sffx.transform(model, ["tanh"], torch.zeros(2, LENGTH, 6))


def test_a_wave_has_a_length():
    pooled = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 1, 3), nn.Flatten())
    model = Layers(
        lambda x: x.mean(-1, keepdim=True), nn.Linear(1, 8), lambda x: x[:, None], first=pooled
    )
    net = sffx.transform(model, "layer", torch.zeros(2, 16))
    assert net(torch.zeros(2, 10)).shape == net(torch.zeros(2, 16)).shape
    with pytest.raises(CutError, match="cannot be told"):
        sffx.transform(model, ["first_2"], torch.zeros(2, 16))


def test_the_block_that_takes_no_other_size_is_named():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    net = sffx.transform(model, "layer", torch.zeros(2, 1, 6, 6))
    with pytest.raises(InputError, match=r"In classifier \(2 … 3\), torch says.*Hint"):
        sffx.local_loss(net, torch.zeros(2, 1, 9, 9), torch.zeros(2, dtype=torch.long))


class GraphAttention(nn.Module):
    """A layer with parameters of its own, on nodes with an adjacency matrix (B, N, N)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.scores = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = x @ self.weight
        one, two = (x @ self.scores).split(1, -1)
        attention = (one + two.mT).masked_fill(adjacency <= 0, -1e9).softmax(-1)
        return F.dropout(attention, 0.1, self.training) @ x


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphAttention(6, WIDTH), GraphAttention(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = self.second(self.first(x, adjacency), adjacency)
        return self.last(x.mean(1))


@pytest.mark.parametrize("nodes", [5, WIDTH])
def test_a_layer_with_parameters_of_its_own_has_their_channels(nodes):
    example = (torch.randn(2, nodes, 6), torch.ones(2, nodes, nodes))
    plan = sffx.plan(GraphNet(), "layer", example)
    # With as many nodes as channels, the sizes do not tell.
    expected = [2, 2] if nodes != WIDTH else [1]
    assert [block.channel_axis for block in plan] == expected
