"""Unsupervised Forward-Forward against hand-written loops in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.objectives.mixing import mixed, others_of, random_masks
from sffx.objectives import UnsupervisedForwardForward
from tests.toys import kept, seeded

CLASSES = 3


@kept
def cut(**options):
    with seeded():
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(36, 9),
            nn.ReLU(),
            nn.Linear(9, 8),
            nn.ReLU(),
            nn.Linear(8, CLASSES),
        ).double()
        x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
        objective = UnsupervisedForwardForward(**options)
        return sffx.transform(model, "layer", x, objective=objective).train()


def batch(samples=6):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(samples, 1, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def unit(h):
    return h / (h.square().mean().sqrt() + 1e-8)


def by_hand(net, x, negatives, y, reduction, threshold):
    """Return the loss of the whole net, sample by sample, and the layers and probes."""
    blocks = [net.block_0, net.block_1]
    layers = [next(m for m in block.modules() if isinstance(m, nn.Linear)) for block in blocks]
    probes = [net.head_0.probe.linear, net.head_1.probe.linear]
    classifier = next(m for m in net.classifier.modules() if isinstance(m, nn.Linear))
    total = 0.0
    for sample, negative, label in zip(x, negatives, y, strict=True):
        clean, mix = sample.flatten(), negative.flatten()
        for layer, probe in zip(layers, probes, strict=True):
            clean = F.relu(F.linear(clean, layer.weight, layer.bias))
            mix = F.relu(F.linear(mix, layer.weight, layer.bias))
            size = len(clean) if reduction == "sum" else 1
            good, bad = clean.square().mean() * size, mix.square().mean() * size
            theta = size if threshold is None else threshold
            total += torch.log1p(torch.exp(theta - good)) / 2
            total += torch.log1p(torch.exp(bad - theta)) / 2
            clean, mix = unit(clean.detach()), unit(mix.detach())
            logits = F.linear(clean, probe.weight, probe.bias)
            total += F.cross_entropy(logits[None], label[None])
        logits = F.linear(clean, classifier.weight, classifier.bias)
        total += F.cross_entropy(logits[None], label[None])
    return total / len(x), [*layers, *probes, classifier]


@pytest.mark.parametrize(("reduction", "threshold"), [("sum", None), ("mean", 0.4)])
def test_gradients_are_those_of_a_loop_by_hand(monkeypatch, reduction, threshold):
    net = cut(reduction=reduction, threshold=threshold)
    x, y = batch()
    negatives = x.flip(0).roll(1, 3)
    where = "sffx.learning.objectives.unsupervised.mixed"
    monkeypatch.setattr(where, lambda given: negatives)
    loss = sffx.local_loss(net, x, y)
    loss.backward()
    expected, layers = by_hand(net, x, negatives, y, reduction, threshold)
    torch.testing.assert_close(loss, expected)
    parameters = [p for layer in layers for p in layer.parameters()]
    assert len(parameters) == len(list(net.parameters()))
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_labels_do_not_reach_the_blocks():
    one, other = cut(), cut()
    x, y = batch()
    for net, labels in ((one, y), (other, (y + 1) % CLASSES)):
        with seeded():
            sffx.local_loss(net, x, labels).backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) == name.startswith("block_"), name


def test_a_prediction_is_the_mean_of_the_probes_but_the_first():
    net = cut().eval()
    x, _ = batch()
    h = x.flatten(1)
    logits = []
    for i in range(2):
        layer = next(m for m in net.get_submodule(f"block_{i}").modules() if hasattr(m, "bias"))
        h = torch.stack([unit(each) for each in F.relu(F.linear(h, layer.weight, layer.bias))])
        logits.append(net.get_submodule(f"head_{i}").probe.linear(h))
    torch.testing.assert_close(sffx.block_scores(net, x)[:-1], torch.stack(logits))
    torch.testing.assert_close(net(x), logits[1])


def test_large_maps_are_pooled_for_the_probe():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )
    objective = UnsupervisedForwardForward(regions=3)
    net = sffx.transform(model, "layer", torch.zeros(1, 1, 9, 9), objective=objective).eval()
    x = torch.rand(2, 1, 9, 9)
    y = net.block_0(x)
    regions = y.unflatten(2, (3, 3)).unflatten(4, (3, 3)).mean((3, 5)).flatten(1)
    normed = regions / regions.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(net.head_0(y), net.head_0.probe.linear(normed))


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 9), st.integers(2, 12), st.integers(2, 12), st.integers(0, 1000))
def test_a_negative_takes_each_pixel_from_one_of_two_images(samples, height, width, seed):
    with seeded(seed):
        x = torch.arange(samples).float()[:, None, None, None].expand(-1, 2, height, width)
        negatives = mixed(x)
    for own, negative in enumerate(negatives):
        assert torch.equal(negative[0], negative[1])
        assert len(set(negative.flatten().tolist()) - {float(own)}) <= 1


@given(st.integers(2, 30), st.integers(0, 1000))
def test_the_other_sample_is_never_the_same(samples, seed):
    with seeded(seed):
        x = torch.arange(samples)
        others = others_of(x)
    assert not (others == x).any()
    assert sorted(others.tolist()) == x.tolist()


@pytest.mark.parametrize("shape", [(28, 28), (1, 5), (7, 2)])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_masks_are_bits_that_were_blurred_six_times(shape, is_autocast):
    height, width = shape
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        masks = random_masks(40, height, width, torch.device("cpu"))
    torch.manual_seed(0)
    blurred = torch.randint(0, 2, (40, 1, height, width)).double()
    for _ in range(6):
        before = F.pad(blurred, (1, 1, 1, 1), mode="replicate")
        rows = (before[:, :, :-2] + 2 * before[:, :, 1:-1] + before[:, :, 2:]) / 4
        blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    assert torch.equal(masks, blurred > 0.5)


def test_masks_have_large_regions():
    with seeded():
        masks = random_masks(50, 28, 28, torch.device("cpu"))
    assert masks.shape == (50, 1, 28, 28)
    assert 0.45 < masks.double().mean() < 0.55
    # Of two neighbours, random bits agree in half of the cases.
    same = (masks[..., 1:] == masks[..., :-1]).double().mean()
    assert same > 0.8


def test_a_batch_of_one_has_no_pairs():
    net = cut()
    x, y = batch(1)
    with pytest.raises(InputError, match="the batch has 1 sample, but the objective"):
        sffx.local_loss(net, x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1}, "threshold is -1. Hint: pass a positive number"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"regions": 0}, "regions is 0. Hint: pass a positive integer"),
        ({"regions": 2.0}, "regions is 2.0"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        UnsupervisedForwardForward(**options)


def linear(inputs, classes):
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, classes))


@pytest.mark.parametrize(
    ("model", "example", "task", "message"),
    [
        (linear(9, 3), torch.zeros(1, 9), None, r"mixes images, float \(C, H, W\), but the input"),
        (
            nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), *linear(54, 4)),
            torch.zeros(1, 9, dtype=torch.long),
            None,
            r"is int64 of shape \(9,\)",
        ),
        (
            nn.Sequential(nn.Flatten(), *linear(16, 2)),
            torch.zeros(1, 1, 4, 4),
            sffx.tasks.Regression(),
            r"probes for classes of a sample, not for sffx\.tasks\.Regression",
        ),
        (
            nn.Sequential(nn.Flatten(), *linear(16, 1)),
            torch.zeros(1, 1, 4, 4),
            sffx.tasks.CLASSIFICATION,
            "the model returns one logit",
        ),
    ],
)
def test_models_that_cannot_learn_by_it(model, example, task, message):
    with pytest.raises(InputError, match=message):
        sffx.transform(model, "layer", example, objective="ff-unsupervised", task=task)
