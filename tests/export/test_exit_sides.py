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


class Sides(nn.Module):
    """Two blocks that read a value, of which the second reads it after samples have left."""

    def __init__(self, make, use) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.make, self.use = make, use

    def forward(self, x: Tensor) -> Tensor:
        side = self.make(x)
        y = self.use(self.a(x), side).relu()
        y = self.use(self.b(y), side).relu()
        return self.head(y)


def _of_rows(y: Tensor, side: Tensor) -> Tensor:
    return y * side.view(-1, 3, 2).sum((1, 2))[:, None]


def _of_halves(y: Tensor, side: Tensor) -> Tensor:
    first, second = side.chunk(2)
    return y * (first + second).sum(1)[:, None]


_SIDES = {
    "features first": (lambda x: x.t(), lambda y, s: y * s.sum(0)[:, None]),
    "stacked": (lambda x: torch.stack([x, 2 * x]), lambda y, s: y * s.sum((0, 2))[:, None]),
    "folded": (lambda x: x.view(-1, 3, 2).flatten(0, 1), _of_rows),
    "behind one another": (lambda x: torch.cat([x, -2 * x]), _of_halves),
    "count": (lambda x: x.shape[0], lambda y, s: y.view(s, 2, 4).flatten(1)),
    "sizes": (lambda x: x.shape[:1], lambda y, s: y.view(*s, 2, 4).flatten(1)),
    "multiple": (lambda x: x.shape[0] * 4, lambda y, s: y.view(s, 2).view(-1, 8)),
}


@pytest.mark.parametrize(("make", "use"), _SIDES.values(), ids=_SIDES)
def test_samples_leave_a_value_on_whatever_axis_they_are(make, use):
    model = Sides(make, use)
    net = sffx.transform(model, ["relu", "relu_1"], torch.zeros(1, 6), check=False)
    runner = sffx.EarlyExit(net)
    x = 3 * torch.randn(12, 6)
    assert len(runner.batched.keys() - {"x", "block_0_output"}) == 1
    confidences = runner.cumulative(x)[0].softmax(1).amax(1).sort().values
    runner.threshold = float(confidences[5:7].mean())
    whole = runner(x)
    assert len(whole.blocks.unique()) > 1
    for i in range(len(x)):
        alone = runner(x[i : i + 1])
        assert whole.blocks[i] == alone.blocks[0]
        torch.testing.assert_close(whole.scores[i], alone.scores[0], rtol=1e-5, atol=1e-5)


def test_samples_cannot_leave_a_value_that_has_them_on_two_axes():
    pairs = Sides(lambda x: x @ x.t(), lambda y, s: s.softmax(1) @ y)
    net = sffx.transform(pairs, ["relu", "relu_1"], torch.zeros(1, 6), check=False)
    with pytest.raises(sffx.InputError, match="crosses a cut and depends on the number"):
        sffx.EarlyExit(net)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["features first", "stacked", "folded", "behind one another"])
def test_samples_leave_the_files_of_an_early_exit_on_whatever_axis_they_are(tmp_path, side):
    torch.manual_seed(0)
    net = sffx.transform(Sides(*_SIDES[side]), ["relu", "relu_1"], torch.zeros(1, 6), check=False)
    runner = sffx.EarlyExit(net)
    x = 3 * torch.randn(12, 6)
    confidences = runner.cumulative(x)[0].softmax(1).amax(1).sort().values
    runner.threshold = float(confidences[5:7].mean())  # between two samples
    folder = sffx.export_early_exit(net, tmp_path / "exit", runner.threshold)
    written = sffx.EarlyExit.load(folder)
    assert written.batched == runner.batched
    expected, actual = runner(x), written(x)
    assert len(expected.blocks.unique()) > 1
    assert actual.blocks.tolist() == expected.blocks.tolist()
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_features_crosses_a_cut_into_a_file(tmp_path):
    net = sffx.transform(Order(), ["mul", "mul_1"], torch.zeros(1, 6))
    sides = {value.name: value.batch for value in net.plan.blocks[0].gives}
    assert sides["argsort"] == BatchAxis(1)
    x = torch.randn(5, 6)
    written = sffx.EarlyExit.load(sffx.export_early_exit(net, tmp_path / "exit"))
    expected = sffx.EarlyExit(net).cumulative(x)
    torch.testing.assert_close(written.cumulative(x), expected, rtol=1e-4, atol=1e-5)


class Scaled(nn.Module):
    """Each block reads plain values that are found before the first: sizes, or nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, rest = batch * height, x.shape[1:3]
        y = self.a(x.reshape(batch, height * width, channels)).relu()
        whole = y.shape
        y = self.b(y.view(rows, width, 8)).relu()
        y = self.c(y.view(batch, *rest, 8)).relu() * (height / width)
        return self.head(y.view(rows, width, 8).view(whole).mean(1))


def test_numbers_that_cross_a_cut_are_part_of_the_files(tmp_path):
    net = sffx.transform(Scaled(), "layer", torch.zeros(1, 2, 3, 6), check=False).eval()
    crossing = [value for block in net.plan for value in block.gives]
    assert len({value.name for value in crossing if value.dtype == "int"}) >= 3
    assert len([value for value in crossing if value.dtype == "Size"]) >= 1
    runner = sffx.EarlyExit(net)
    written = sffx.EarlyExit.load(sffx.export_early_exit(net, tmp_path / "net"))
    x = 3 * torch.randn(12, 2, 3, 6)
    confidences = runner.cumulative(x)[0].softmax(1).amax(1).sort().values
    runner.threshold = written.threshold = float(confidences[5:7].mean())
    expected, found = runner(x), written(x)
    assert len(expected.blocks.unique()) > 1
    assert torch.equal(found.blocks, expected.blocks)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
