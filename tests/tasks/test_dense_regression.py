"""Numbers of pixels: which sizes of scores and targets go together, and how they are compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx.lightning import BPModule
from sffx.plain import logits_of
from sffx.tasks import DenseRegression, Regression
from tests.tasks.cases import Patches


class Enlarging(nn.Module):
    """Two convolutions, then twice the resolution, as super-resolution does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.last = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def enlarging(**options: object) -> sffx.net.CutModel:
    torch.manual_seed(0)
    image = torch.zeros(2, 1, 6, 4)
    return sffx.transform(Enlarging(), "module", image, task=DenseRegression(), **options)


def test_the_classifier_learns_from_the_full_resolution_and_a_block_from_means():
    net = enlarging(norm="none").train()
    x, y = torch.randn(3, 1, 6, 4), torch.randn(3, 2, 12, 8)
    losses = sffx.block_losses(net, x, y)
    model = sffx.extract(net)
    torch.testing.assert_close(losses["classifier"], F.mse_loss(model(x), y))
    means = F.avg_pool2d(y, 2)
    block = net.head_0(model.first(x))
    torch.testing.assert_close(losses["block_0"], F.mse_loss(block, means))
    evaluation = sffx.evaluate(net, [(x, y)])
    enlarged = F.interpolate(block, size=(12, 8), mode="bilinear")
    mse = float(F.mse_loss(enlarged, y).detach())
    assert evaluation.metrics["mse"]["block_0"] == pytest.approx(mse, rel=1e-4)


@pytest.mark.parametrize("loss_fn", [F.l1_loss, nn.HuberLoss()])
def test_a_loss_of_ones_own_gets_scores_of_the_size_of_y(loss_fn):
    net = enlarging().train()
    x, y = torch.randn(3, 1, 6, 4), torch.randn(3, 2, 12, 8)
    losses = sffx.block_losses(net, x, y, loss_fn)
    scores = sffx.block_scores(net, x)
    enlarged = F.interpolate(scores[0], size=(12, 8), mode="bilinear")
    torch.testing.assert_close(losses["block_0"], loss_fn(enlarged, y).detach())


@pytest.mark.parametrize(
    ("size", "target"), [((6, 4), (6, 4)), ((6, 4), (8, 12)), ((8, 8), (8, 8)), ((8, 6), (12, 16))]
)
def test_targets_of_another_size_than_the_output_are_refused(size, target):
    net = enlarging().train()
    x, y = torch.randn(2, 1, *size), torch.randn(2, 2, *target)
    for take in (
        lambda: sffx.local_loss(net, x, y),
        lambda: sffx.sff_loss(net(x), y, task=net.plan.task),
        lambda: sffx.evaluate(net, [(x, y)]),
    ):
        with pytest.raises(
            sffx.InputError, match=r"pixels, but the model's output .*Hint: targets"
        ):
            take()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_the_loss_of_two_sizes_is_that_of_the_means_over_the_coarser(data, space):
    coarse = [data.draw(st.integers(1, 3)) for _ in range(space)]
    factors = [data.draw(st.integers(1, 3)) for _ in range(space)]
    fine = [n * factor for n, factor in zip(coarse, factors, strict=True)]
    one, other = torch.randn(2, 2, *coarse), torch.randn(2, 2, *fine)
    task = DenseRegression().settled(other.shape)
    means = other
    for axis, factor in enumerate(factors, start=2):
        means = means.unflatten(axis, (-1, factor)).mean(axis + 1)
    expected = F.mse_loss(one, means)
    torch.testing.assert_close(task.loss(one, other), expected)
    torch.testing.assert_close(task.loss(other, one), expected)


def test_the_metrics_are_those_of_all_pixels_as_samples():
    scores, y = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    rows = [value.permute(0, 2, 3, 1).reshape(-1, 2) for value in (scores, y)]
    task, plain = DenseRegression(), Regression()
    assert task.metrics(task.sums(scores, y)) == pytest.approx(plain.metrics(plain.sums(*rows)))
    assert task.metrics(task.sums(y, y))["r2"] == 1


def test_maps_of_numbers_are_not_guessed_but_named_in_the_hint():
    with pytest.raises(sffx.TraceError, match=r"DenseRegression\(\)"):
        sffx.plan(Enlarging(), "module", torch.zeros(2, 1, 6, 4))
    with pytest.raises(sffx.TraceError, match=r"numbers of pixels pass .*DenseRegression\(\)"):
        sffx.plan(Enlarging(), "module", torch.zeros(2, 1, 6, 4), task=Regression())
    flat = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(sffx.TraceError, match=r"pass task=sffx\.tasks\.Regression\(\)"):
        sffx.plan(flat, "layer", torch.zeros(2, 4), task=DenseRegression())


def test_a_hidden_layer_does_not_read_a_single_channel_minus_its_mean():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
    x = torch.zeros(2, 1, 6, 6)
    with pytest.raises(sffx.InputError, match=r"minus its mean is 0.*Hint: goodness='sff'"):
        sffx.transform(model, "layer", x, task=DenseRegression(), goodness="mlp")
    assert len(sffx.transform(model, "layer", x, task=DenseRegression()).plan) == 1


def depth_of(space: int, with_axis: bool) -> tuple[nn.Module, Tensor]:
    """Return a model of one number for each place, with an axis for it or without."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
    layers = [conv(2, 4, 3, stride=2, padding=1), nn.ReLU(), conv(4, 1, 1)]
    layers += [nn.Upsample(scale_factor=2)]
    layers += [] if with_axis else [nn.Flatten(1, 2)]
    return nn.Sequential(*layers), torch.randn(3, 2, *(8, 6, 4)[:space])


@pytest.mark.parametrize("space", [2, 3])
@pytest.mark.parametrize("loss_fn", [None, F.l1_loss])
def test_the_axis_of_a_single_number_may_lack_in_the_output_and_in_y(space, loss_fn):
    losses, evaluations = [], []
    for output_has_axis in (True, False):
        torch.manual_seed(0)
        model, x = depth_of(space, output_has_axis)
        net = sffx.transform(model, "layer", x, task=DenseRegression()).train()
        assert net.plan.task == DenseRegression(space=space, lacks_axis=not output_has_axis)
        for y in (x[:, :1], x[:, 0]):
            losses.append(sffx.block_losses(net.train(), x, y, loss_fn))
            assert net.eval()(x).shape == model(x).shape
            evaluations.append(sffx.evaluate(net, [(x, y)]).metrics["mse"])
    for i in range(1, len(losses)):
        torch.testing.assert_close(losses[i], losses[0])
        assert evaluations[i] == pytest.approx(evaluations[0])


def test_a_list_of_points_is_no_map():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 34))
    model.append(nn.Unflatten(1, (17, 2)))
    task = DenseRegression()
    assert not task.settled((2, 17, 2), [(2, 3, 8, 8)]).lacks_axis
    with pytest.raises(sffx.CutError, match="no node to cut at"):
        sffx.plan(model, "layer", torch.zeros(2, 3, 8, 8), task=task)


@pytest.mark.parametrize(
    ("image", "answer"),
    [
        ((8, 6), (8, 6)),
        ((9, 7), (5, 4)),
        ((32, 48), (8, 12)),
        ((12, 10), (8, 6)),
        ((5, 4), (10, 8)),
    ],
)
def test_a_map_has_the_share_or_the_margin_of_each_side_of_the_image(image, answer):
    assert DenseRegression().settled((2, *answer), [(2, 3, *image)]).lacks_axis
    assert not DenseRegression().settled((2, 3, *answer), [(2, 3, *image)]).lacks_axis
    with_steps = DenseRegression().settled((2, *answer), [(2, 3, *image), (2,)])
    assert with_steps.lacks_axis


def test_depth_in_a_record_is_found():
    class Record(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"depth": self.model(x)}

    model, x = depth_of(2, with_axis=False)
    net = sffx.transform(Record(model), "layer", x, task=DenseRegression(), norm="none")
    assert logits_of(Record(model)(x), net.plan.task, 1).shape == x[:, 0].shape
    module = BPModule(Record(model), lr=0.1, task=DenseRegression())
    torch.testing.assert_close(
        module.loss(x, x[:, 0]), sffx.block_losses(net.train(), x, x[:, 0])["classifier"]
    )


class Depth(Patches):
    """One number for each pixel, from maps, tokens and maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def test_a_token_of_a_grid_is_a_pixel_of_a_map_without_an_axis(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 16)
    net = sffx.transform(Depth(33), "layer", x, task=DenseRegression(), check=True)
    assert [block.shape for block in net.plan] == [(6, 4, 8), (33, 6), (33, 6), (6, 8, 16)]
    y = torch.randn(2, 8, 16)
    scores = net.train()(x)
    assert [each.shape for each in scores[1:]] == [(2, 1, 33), (2, 1, 33), (2, 1, 8, 16), y.shape]
    on_map = scores[1][..., 1:].reshape(2, 4, 8)
    expected = F.mse_loss(on_map, F.avg_pool2d(y, 2))
    torch.testing.assert_close(sffx.block_losses(net, x, y)["block_1"], expected)
    enlarged = F.interpolate(on_map[:, None], size=(8, 16), mode="bilinear")[:, 0]
    mse = float(F.mse_loss(enlarged, y).detach())
    evaluation = sffx.evaluate(net, [(x, y)])
    assert evaluation.metrics["mse"]["block_1"] == pytest.approx(mse, rel=1e-4)
    assert net.eval()(x).shape == y.shape
    sffx.export_program(net, tmp_path / "net.pt2")  # compares with torch
