"""Values whose batch is not the first axis get a view that a cut may follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.batch_axis import BATCH_SIZES


class SequenceFirst(nn.Module):
    """Layers of torch that read (T, B, C), between two transposes."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        if layer == "encoder":
            one = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
            self.layers = nn.TransformerEncoder(one, 3, enable_nested_tensor=False)
        else:
            self.layers = nn.Sequential(*(Residual() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x).transpose(0, 1))
        return self.head(x.mean(0))


class Residual(nn.Module):
    """A sum in place behind attention, on (T, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        y += x
        return self.linear(y)


@pytest.mark.parametrize("layer", ["encoder", "residual"])
def test_sequence_first_layers_are_blocks(layer):
    torch.manual_seed(0)
    model, x = SequenceFirst(layer).double(), torch.randn(5, 6, 3, dtype=torch.float64)
    net = sffx.transform(model, example_input=x, norm="none").train()
    assert len(net.plan) == 4
    assert [block.shape for block in net.plan] == [(6, 8)] * 4
    assert {block.channel_axis for block in net.plan} == {2}
    torch.testing.assert_close(net(x)[-1], model(x))
    sffx.local_loss(net, x, torch.arange(5) % 4).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("length", BATCH_SIZES)
def test_a_sequence_as_long_as_the_batch_of_the_trace_is_cut_as_others(length):
    model = SequenceFirst("residual")
    model.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(2, length, 3)
    expected = [block.name for block in sffx.plan(model, "layer", x[:, :7]).all_blocks]
    assert [block.name for block in sffx.plan(model, "layer", x).all_blocks] == expected


class InOneForward(nn.Module):
    """Time-major images, as of spiking nets, with sums in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        times, batch = x.shape[:2]
        x = self.stem(x.flatten(0, 1)).unflatten(0, (times, batch))
        for layer in self.layers:
            x = x + layer(x.flatten(0, 1)).unflatten(0, (times, batch)).relu()
        return self.head(x.mean((0, 3, 4)))


def test_time_major_images_are_cut_at_their_sums():
    torch.manual_seed(0)
    model, x = InOneForward(), torch.randn(5, 2, 3, 7, 7)
    net = sffx.transform(model, example_input=x, norm="none").train()
    assert [block.shape for block in net.plan][-3:] == [(2, 4, 7, 7)] * 3
    assert {block.channel_axis for block in net.plan} == {2}
    torch.testing.assert_close(net(x)[-1], model(x))


def test_a_goodness_is_that_of_the_sample():
    model, x = SequenceFirst("encoder").double(), torch.randn(5, 6, 3, dtype=torch.float64)
    net = sffx.transform(model, example_input=x).train()
    torch.testing.assert_close(net(x)[:, 2:3], net(x[2:3]))


def test_batch_first_models_get_no_views():
    plan = sffx.plan(
        nn.Sequential(nn.Linear(3, 8), nn.Flatten(), nn.Linear(48, 4)),
        "layer",
        torch.zeros(2, 6, 3),
    )
    assert not any("batch_first" in name for block in plan.all_blocks for name in block.nodes)


class EachStep(nn.Conv2d):
    """A convolution of each image of (T, B, C, H, W), as spiking nets have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class NormOfEachStep(nn.BatchNorm2d):
    """A batch norm of each image of (T, B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("norm", [NormOfEachStep, nn.Identity])
def test_channels_of_subclassed_layers_lie_before_space(norm):
    torch.manual_seed(0)
    layers = []
    for width in (3, 6, 6):
        layers += [EachStep(width, 6, 3, padding=1), norm(6), nn.ReLU()]

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.Sequential(*layers), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(0).repeat(2, 1, 1, 1, 1)
            return self.head(self.layers(x).mean((3, 4))).mean(0)

    model, x = Clip().double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    net = sffx.transform(model, example_input=x, norm="none", policy="layer").train()
    assert [block.shape for block in net.plan] == [(2, 6, 8, 8)] * 3
    assert {block.channel_axis for block in net.plan} == {2}
    assert [head.shape for head in net(x)] == [(5, 4)] * 4
    torch.testing.assert_close(net(x)[-1], model(x))
