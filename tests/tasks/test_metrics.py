"""Metrics of tasks against scikit-learn and by hand, and kernels against torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sffx import tasks
from sffx.kernels import batch_slices, entropy, squares
from sffx.kernels.majority import majority_labels
from sffx.tasks.task import Task

IGNORED = 255


def metrics(task: Task, scores: Tensor, y: Tensor) -> dict[str, float]:
    return task.metrics(task.sums(scores, y))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 4))
def test_f1_is_that_of_scikit_learn(seed, samples, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, labels, generator=generator)
    y = torch.randint(0, 2, (samples, labels), generator=generator).float()
    found = metrics(tasks.MultiLabel(), scores, y)
    predicted = (scores > 0).int().numpy()
    there = y.int().numpy()
    for name, average in (("f1", "macro"), ("f1_micro", "micro")):
        expected = sklearn.f1_score(there, predicted, average=average, zero_division=0)
        assert found[name] == pytest.approx(expected), name
    assert found["accuracy"] == pytest.approx((predicted == there).mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 3), st.booleans())
def test_errors_and_r2_are_those_of_scikit_learn(seed, samples, outputs, constant):
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    y = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    if constant:
        y[:, 0] = 3.0
    found = metrics(tasks.Regression(), scores, y)
    assert found["r2"] == pytest.approx(sklearn.r2_score(y, scores))
    assert found["mse"] == pytest.approx(sklearn.mean_squared_error(y, scores))
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(y, scores))
    assert found["loss"] == found["mse"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_iou_is_that_of_scikit_learn(seed, classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, classes, 3, 4, generator=generator)
    y = torch.randint(0, classes, (2, 3, 4), generator=generator)
    y[0, 0] = 255
    task = tasks.Segmentation(ignore_index=255)
    kept = y != 255
    true, predicted = y[kept].numpy(), scores.argmax(1)[kept].numpy()
    occurring = sorted({*true.tolist(), *predicted.tolist()})
    expected = sklearn.jaccard_score(true, predicted, average=None, labels=occurring)
    sums = task.sums(scores, y)
    assert task.metrics(sums)["mean_iou"] == pytest.approx(expected.mean())
    of_classes = task.by_class(sums)
    assert [of_classes[i] for i in occurring] == pytest.approx(expected.tolist())
    assert all(math.isnan(of_classes[i]) for i in range(classes) if i not in occurring)


def test_perplexity_is_of_the_tokens_that_are_predicted():
    task = tasks.LanguageModel()
    scores = torch.randn(2, 4, 5)
    y = torch.tensor([[0, 1, 2, 3], [4, 0, -100, -100]])
    logs = scores.log_softmax(2)
    found = [logs[0, 0, 1], logs[0, 1, 2], logs[0, 2, 3], logs[1, 0, 0]]
    expected = math.exp(-float(torch.stack(found).mean()))
    assert metrics(task, scores, y)["perplexity"] == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.integers(2, 40))
def test_a_pixel_of_a_block_has_the_label_of_most_of_its_pixels(seed, side, classes):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (2, 2 * side, 3 * side), generator=generator)
    y[y == classes - 1] = IGNORED
    task = tasks.Segmentation(ignore_index=IGNORED)
    scores = torch.randn(2, classes, 2, 3, generator=generator)
    labels = y.unfold(1, side, side).unfold(2, side, side).flatten(3)
    expected = torch.empty(2, 2, 3, dtype=torch.int64)
    for place in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        own = labels[tuple(place)].tolist()
        expected[tuple(place)] = max([IGNORED, *range(classes)], key=own.count)
    found = task.loss(scores, y)
    count = max(int((expected != IGNORED).sum()), 1)
    total = F.cross_entropy(scores, expected, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(found, total / count)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=2, max_size=3),
    st.sampled_from([-100, 0, 2, 255]),
    st.integers(1, 200),
)
def test_a_pixel_covers_those_of_an_adaptive_pool(seed, sides, ignored, small):
    # No size need divide the other, so windows overlap; the block may be the larger one.
    generator = torch.Generator().manual_seed(seed)
    old, new = zip(*sides, strict=True)
    y = torch.randint(0, 4, (3, *old), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.3] = ignored
    pool = F.adaptive_avg_pool2d if len(old) == 2 else F.adaptive_avg_pool3d
    most = torch.zeros(3, *new, dtype=torch.float64)
    expected = torch.full((3, *new), ignored)
    for label in [ignored, *range(4)]:
        share = pool((y == label).double()[:, None], new)[:, 0]
        expected = torch.where(share > most + 1e-9, label, expected)
        most = torch.maximum(most, share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_slices, "_SMALL", small)
        assert torch.equal(majority_labels(y, new, 4, ignored), expected)


def test_voxels_are_as_pixels():
    task = tasks.Segmentation(space=3)
    scores = torch.randn(1, 3, 2, 2, 2)
    y = torch.randint(0, 3, (1, 2, 2, 2)).repeat_interleave(2, 3)
    expected = F.cross_entropy(scores, y[..., ::2], reduction="sum") / 8
    torch.testing.assert_close(task.loss(scores, y), expected)
    assert metrics(task, scores, y)["loss"] > 0
    assert task.aligned([scores, torch.randn(1, 3, 4, 4, 4)])[0].shape == (1, 3, 4, 4, 4)


def test_the_answer_and_the_metrics_are_of_enlarged_scores():
    task = tasks.Segmentation()
    scores = torch.randn(2, 3, 2, 2)
    y = torch.randint(0, 3, (2, 4, 6))
    large = F.interpolate(scores, (4, 6), mode="bilinear")
    blocks = [scores, torch.randn(2, 3, 4, 6)]
    assert torch.equal(task.aligned(blocks)[0], large)
    expected = (large.argmax(1) == y).float().mean()
    assert metrics(task, scores, y)["accuracy"] == pytest.approx(float(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ignored", [(), (0, 3), range(7)])
def test_cross_entropy_in_parts_is_that_of_torch(monkeypatch, dtype, ignored):
    monkeypatch.setattr(entropy, "MANY_CLASSES", 2)
    monkeypatch.setattr("sffx.kernels.batch_slices._SMALL", 20)
    scores = (10 * torch.randn(7, 9, dtype=dtype)).requires_grad_()
    y = torch.randint(0, 9, (7,))
    y[list(ignored)] = -1
    found = entropy.summed_cross_entropy(scores[None], y[None], -1, 2)
    expected = F.cross_entropy(scores, y, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(found, expected)
    for loss, weight in ((found, 3.0), (expected, 3.0)):
        (loss * weight).backward(retain_graph=True)
    own, of_torch = scores.grad.clone(), None
    scores.grad = None
    (expected * 6.0).backward()
    of_torch = scores.grad
    torch.testing.assert_close(own, of_torch)


def test_squares_in_parts_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(squares, "MANY_CLASSES", 2)
    monkeypatch.setattr("sffx.kernels.batch_slices._SMALL", 20)
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    found = squares.squared_linear(y, weight, bias)
    expected = F.linear(y, weight, bias).square()
    torch.testing.assert_close(found, expected)
    mixture = torch.randn_like(found)
    inputs = (y, weight, bias)
    own = torch.autograd.grad((found * mixture).sum(), inputs)
    of_torch = torch.autograd.grad((expected * mixture).sum(), inputs)
    torch.testing.assert_close(own, of_torch)
