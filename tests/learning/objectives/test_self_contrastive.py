"""Self-Contrastive Forward-Forward against loops in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.objectives.mixing import moved
from sffx.objective import Batch
from sffx.objectives import SCFF
from tests.toys import kept, seeded

CLASSES = 3
POSITIVE, NEGATIVE, PENALTY = (0.5, 0.2), (0.7, 0.9), (0.01, 0.3)
PER_BLOCK = {"positive_threshold": POSITIVE, "negative_threshold": NEGATIVE, "penalty": PENALTY}


@kept
def cut(cuts=("_1", "_3"), **options):
    with seeded():
        model = nn.Sequential(
            nn.Conv2d(2, 5, 3),
            nn.ReLU(),
            nn.Conv2d(5, 4, 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, CLASSES),
        ).double()
        # The last block ends in front of the pooling, so its output is a map.
        x = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
        objective = SCFF(**options)
        return sffx.transform(model, list(cuts), x, objective=objective).train()


def batch(samples=5):
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.rand(samples, 2, 6, 6, dtype=torch.float64, generator=generator) + 1
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def layer_of(module):
    return next(m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def standardized(x):
    return torch.stack([(each - each.mean()) / each.std() for each in x])


def normed(h):
    return F.layer_norm(h, h.shape[1:])


def block_loss(good, bad, index):
    """Return a block's loss as the authors write it, given the two views' outputs."""
    g_good, g_bad = good.pow(2).mean(1), bad.pow(2).mean(1)
    too_small = torch.log(1 + torch.exp(POSITIVE[index] - g_good)).mean((1, 2)).mean()
    too_large = torch.log(1 + torch.exp(g_bad - NEGATIVE[index])).mean((1, 2)).mean()
    return too_small + too_large + PENALTY[index] * g_good.norm(p=2, dim=(1, 2)).mean()


@pytest.mark.parametrize("triangle", [False, True])
def test_gradients_are_those_of_pairs_through_shared_weights(triangle, monkeypatch):
    cuts = ("_0", "_2") if triangle else ("_1", "_3")
    net = cut(cuts, triangle=triangle, **PER_BLOCK)
    x, y = batch()

    def handed_on(z):
        return F.relu(normed(z)) if triangle else normed(F.relu(z))

    def probed(z):
        output = F.relu(z - z.mean(1, keepdim=True)) if triangle else F.relu(z)
        return normed(F.adaptive_avg_pool2d(output.detach(), 2).flatten(1))

    where = "sffx.learning.objectives.self_contrastive.others_of"
    monkeypatch.setattr(where, lambda given: given.roll(-1, 0))
    loss = sffx.local_loss(net, x, y)
    loss.backward()

    first, second = layer_of(net.block_0), layer_of(net.block_1)
    halves = standardized(x)
    others = halves.roll(-1, 0)
    # The pair goes through the same weights, half by half, and is added before the ReLU.
    good = first(halves) + first(halves)
    bad = first(halves) + first(others)
    expected = block_loss(F.relu(good), F.relu(bad), 0)
    # The net has the mean of a pair, not the sum. It matters to the eps of the norm alone.
    outputs = [good / 2]
    good, bad = handed_on(good.detach() / 2), handed_on(bad.detach() / 2)
    good, bad = second(good), second(bad)
    expected = expected + block_loss(F.relu(good), F.relu(bad), 1)
    outputs.append(good)
    layers = [first, second]
    for i, output in enumerate(outputs):
        probe = net.get_submodule(f"head_{i}").probe.linear
        expected = expected + F.cross_entropy(probe(probed(output)), y)
        layers.append(probe)
    classifier = layer_of(net.classifier)
    features = handed_on(good.detach()).mean((2, 3))
    expected = expected + F.cross_entropy(classifier(features), y)
    layers.append(classifier)

    torch.testing.assert_close(loss, expected)
    parameters = [p for layer in layers for p in layer.parameters()]
    assert len(parameters) == len(list(net.parameters()))
    gradients = torch.autograd.grad(expected, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_linear_probe_reads_the_triangle():
    net = cut(cuts=("_0", "_2"), triangle=True)
    x, _ = batch()
    output = layer_of(net.block_0)(standardized(x))
    triangle = F.relu(output - output.mean(1, keepdim=True))
    expected = normed(F.adaptive_avg_pool2d(triangle, 2).flatten(1))
    found = sffx.LinearProbe(net, ["block_0"]).features(x)
    torch.testing.assert_close(found, expected)


def test_the_halves_of_a_pair_are_moved_by_themselves(monkeypatch):
    halves = []

    def noted(x, pixels):
        halves.append(moved(x, pixels))
        return halves[-1]

    module = "sffx.learning.objectives.self_contrastive"
    monkeypatch.setattr(f"{module}.moved", noted)
    monkeypatch.setattr(f"{module}.others_of", lambda given: given.roll(-1, 0))
    x, y = batch()
    samples = Batch({"x": x}, y, CLASSES, scores=lambda: x)
    with seeded():
        views = SCFF(shift=2).training_views(samples)["x"]
    first, second = map(standardized, halves)
    torch.testing.assert_close(views[:5], (first + second) / 2)
    torch.testing.assert_close(views[5:], (first + second.roll(-1, 0)) / 2)
    assert not torch.equal(first, second)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(4, 7), st.integers(0, 3), st.integers(0, 9)
)
def test_each_image_is_moved_by_its_own_offset(channels, height, width, pixels, seed):
    x = 1 + torch.rand(6, channels, height, width)
    with seeded(seed):
        result = moved(x, pixels)
    assert result.shape == x.shape
    padded = F.pad(x, (pixels,) * 4)
    reach = range(2 * pixels + 1)
    for i, image in enumerate(result):
        crops = [padded[i, :, a : a + height, b : b + width] for a in reach for b in reach]
        assert any(torch.equal(image, crop) for crop in crops)


def test_images_are_moved_in_all_directions():
    x = torch.zeros(200, 1, 5, 5)
    x[:, :, 2, 2] = 1
    with seeded():
        places = moved(x, 1).flatten(1).argmax(1).tolist()
    assert set(places) == {6, 7, 8, 11, 12, 13, 16, 17, 18}


def test_inputs_are_standardised_at_prediction_as_well():
    net, plain = cut().eval(), cut(standardize=False).eval()
    x, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(standardized(x)))
        assert not torch.allclose(net(x), plain(x))
    torch.testing.assert_close(
        sffx.LinearProbe(net, regions=1).features(x),
        sffx.LinearProbe(plain, regions=1).features(standardized(x)),
    )


def test_a_prediction_is_the_mean_of_all_probes():
    net = cut().eval()
    x, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(net(x), sffx.block_scores(net, x)[:2].mean(0))


def test_vectors_have_one_position():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, CLASSES))
    net = sffx.transform(model, "layer", torch.zeros(1, 6), objective="scff").train()
    x = torch.rand(4, 6)
    columns = net.head_0(net.block_0(x))[:, :3]
    goodness = (2 * net.block_0(x)).square().mean(1)
    expected = [F.softplus(4 - goodness), F.softplus(goodness - 6), 1e-4 * goodness]
    torch.testing.assert_close(columns, torch.stack(expected, dim=1))


def test_a_batch_of_one_has_no_pairs():
    with pytest.raises(InputError, match="the batch has 1 sample, but the objective 'scff'"):
        sffx.local_loss(cut(), *batch(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_threshold": -1}, "positive_threshold is -1. Hint: pass a number, 0 or more"),
        ({"negative_threshold": (1, -2)}, "negative_threshold is -2"),
        ({"penalty": ()}, r"penalty is \(\). Hint: pass a number, or a tuple with one for each"),
        ({"penalty": "much"}, "penalty is 'much'"),
        ({"standardize": 1}, "standardize is 1. Hint: pass True or False"),
        ({"triangle": "relu"}, "triangle is 'relu'. Hint: pass True or False"),
        ({"shift": -1}, "shift is -1. Hint: pass an integer, 0 or more"),
        ({"shift": 1.5}, "shift is 1.5"),
        ({"regions": True}, "regions is True"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        SCFF(**options)


def test_options_of_other_nets():
    with pytest.raises(InputError, match="penalty holds 3 numbers, but there are 2 blocks"):
        cut(penalty=[0, 0, 1])
    assert SCFF(penalty=[0, 1]) == SCFF(penalty=(0, 1))


def test_inputs_that_have_no_mean():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(54, 8), nn.Linear(8, 4))
    with pytest.raises(InputError, match="holds int64, not floats"):
        sffx.transform(model, "layer", torch.zeros(1, 9, dtype=torch.long), objective="scff")
    task = sffx.tasks.Regression()
    with pytest.raises(InputError, match=r"probes for classes of a sample, not for sffx\.tasks"):
        sffx.transform(model[2:], "layer", torch.zeros(1, 54), objective="scff", task=task)


def test_inputs_that_cannot_be_moved():
    with pytest.raises(InputError, match=r"shift is 6.*'input' has the shape \(2, 6, 6\)"):
        cut(shift=6)
    model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"the shape \(9,\).*begins with Flatten takes images"):
        sffx.transform(model, "layer", torch.zeros(1, 9), objective=SCFF(shift=1))


def test_a_single_value_has_no_deviation():
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(InputError, match=r"has 1 value, \(1,\). Hint: standardize=False"):
        sffx.plan(model, "layer", torch.zeros(1, 1), objective="scff")
    assert sffx.plan(model, "layer", torch.zeros(1, 1), objective=SCFF(standardize=False))
