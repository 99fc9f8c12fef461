"""Labels of pixels: one or several, with the axis of a single label or without it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx.tasks import MultiLabel, MultiLabelSegmentation, Segmentation
from tests.tasks.cases import Patches, images


def one_mask(*, with_axis: bool) -> nn.Module:
    tail = [] if with_axis else [nn.Flatten(1, 2)]
    return images(nn.Upsample(scale_factor=2), nn.Conv2d(6, 1, 1), *tail)


def mask_of(x: Tensor) -> Tensor:
    return (x[:, :1] > 0).float()


@pytest.mark.parametrize("lay_out", [lambda y: y, lambda y: y[:, 0], lambda y: y[:, 0].bool()])
def test_the_axis_of_a_single_label_may_lack_in_the_output_and_in_y(lay_out):
    x = torch.randn(4, 3, 8, 8)
    y = lay_out(mask_of(x))
    results = []
    for with_axis in (True, False):
        torch.manual_seed(0)
        model = one_mask(with_axis=with_axis)
        net = sffx.transform(model, "batchnorm", x, task=MultiLabelSegmentation())
        losses = sffx.block_losses(net.train(), x, mask_of(x))
        of_layout = sffx.block_losses(net, x, y)
        torch.testing.assert_close(of_layout, losses)
        results.append((losses, sffx.evaluate(net, [(x, y)]).metrics))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_loss_of_a_coarse_block_takes_the_share_of_the_pixels_that_have_the_label():
    x = torch.randn(4, 3, 8, 8)
    net = sffx.transform(
        one_mask(with_axis=True), "batchnorm", x, task=MultiLabelSegmentation(), norm="none"
    ).train()
    y = mask_of(x)
    scores = net(x)
    assert scores[0].shape == (4, 1, 4, 4)
    expected = F.binary_cross_entropy_with_logits(scores[0], F.avg_pool2d(y, 2))
    torch.testing.assert_close(sffx.block_losses(net, x, y)["block_0"], expected.detach())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3))
def test_the_metrics_are_those_of_all_pixels_as_samples(labels, space):
    scores = torch.randn(3, labels, *range(2, 2 + space))
    y = (torch.randn_like(scores) > 0).float()
    rows = [value.movedim(1, -1).reshape(-1, labels) for value in (scores, y)]
    task, plain = MultiLabelSegmentation().settled(y.shape), MultiLabel()
    found = task.metrics(task.sums(scores, y))
    mean_iou = found.pop("mean_iou")
    assert found == pytest.approx(plain.metrics(plain.sums(*rows)))
    there, predicted = rows[1] > 0.5, rows[0] > 0
    iou = (there & predicted).sum(0) / (there | predicted).sum(0).clamp(min=1)
    assert task.by_class(task.sums(scores, y)) == pytest.approx(iou.tolist())
    assert mean_iou == pytest.approx(float(iou.mean()))
    # Dice, which F1 is, and IoU say the same of one label.
    assert plain.by_class(plain.sums(*rows)) == pytest.approx((2 * iou / (1 + iou)).tolist())


def test_the_ensemble_is_the_mean_of_the_logits_and_weights_mix_probabilities():
    x = torch.randn(4, 3, 8, 8)
    net = sffx.transform(
        one_mask(with_axis=False), "batchnorm", x, task=MultiLabelSegmentation(), check=False
    )
    scores = sffx.block_scores(net.eval(), x)
    enlarged = [F.interpolate(each, size=(8, 8), mode="bilinear")[:, 0] for each in scores[:-1]]
    logits = torch.stack(enlarged)
    torch.testing.assert_close(net(x), logits.mean(0))
    weights = sffx.weigh(net, [(x, mask_of(x))])
    assert net.readout.mode == "weighted"
    shares = torch.tensor(list(weights.values()))
    mixed = (shares[:, None, None, None] * logits.sigmoid()).sum(0)
    torch.testing.assert_close(net(x).sigmoid(), mixed)


def test_a_token_of_a_grid_has_labels_as_a_pixel(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    net = sffx.transform(Patches(), "layer", x, task=MultiLabelSegmentation()).train()
    scores = net(x)
    assert scores[1].shape == (2, 3, 17)
    y = (torch.randn(2, 3, 8, 8) > 0).float()
    on_map = scores[1][..., 1:].reshape(2, 3, 4, 4)
    expected = F.binary_cross_entropy_with_logits(on_map, F.avg_pool2d(y, 2))
    torch.testing.assert_close(sffx.block_losses(net, x, y)["block_1"], expected.detach())
    sffx.export_onnx(net, tmp_path / "net.onnx")  # compares with torch


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            torch.zeros(2, 2, 8, 8),
            r"has shape \(2, 2, 8, 8\), not \(2, 1, H, W\).*Hint: the labels",
        ),
        (torch.full((2, 1, 8, 8), 255.0), r"runs from 255.0 to 255.0.*Hint: 1 where"),
        (torch.zeros(2, 1, 4, 4), r"y has 4 x 4 pixels, but the model's output 8 x 8.*Hint"),
        ([0, 1], "is a list, not a tensor.*Hint: pass the labels of each pixel"),
    ],
)
def test_wrong_targets_are_refused(y, message):
    x = torch.randn(2, 3, 8, 8)
    net = sffx.transform(
        one_mask(with_axis=True), "batchnorm", x, task=MultiLabelSegmentation(), check=False
    )
    with pytest.raises(sffx.InputError, match=message):
        sffx.local_loss(net.train(), x, y)


def test_a_model_with_one_logit_for_each_pixel_is_told_of_the_task():
    x = torch.randn(2, 3, 8, 8)
    for task in (None, Segmentation()):
        with pytest.raises(
            sffx.InputError, match=r"Hint: for a mask of 0 and 1 pass .*MultiLabelS"
        ):
            sffx.plan(one_mask(with_axis=True), "batchnorm", x, task=task)
    with pytest.raises(sffx.TraceError, match=r"labels of pixels pass .*MultiLabelSegmentation"):
        sffx.plan(one_mask(with_axis=True), "batchnorm", x, task=MultiLabel())
    flat = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(sffx.TraceError, match=r"labels of a sample pass task=.*MultiLabel\(\)"):
        sffx.plan(flat, "layer", torch.zeros(2, 4), task=MultiLabelSegmentation())
    squashed = nn.Sequential(*one_mask(with_axis=True), nn.Sigmoid())
    with pytest.raises(sffx.TraceError, match="returns a sigmoid"):
        sffx.plan(squashed, "batchnorm", x, task=MultiLabelSegmentation())
