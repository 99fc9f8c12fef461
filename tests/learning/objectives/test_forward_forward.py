"""Supervised Forward-Forward against hand-written loops in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sffx
from sffx import InputError
from sffx.learning.objectives.labels import LABEL_CODES, likely_other_labels, other_labels
from sffx.objectives import ForwardForward
from tests.toys import kept, seeded

CLASSES = 4


def perceptron():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 12),
        nn.ReLU(),
        nn.Linear(12, 10),
        nn.ReLU(),
        nn.Linear(10, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


@kept
def cut(**options):
    with seeded():
        model = perceptron().double()
    x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    objective = ForwardForward(**options)
    return sffx.transform(model, policy="layer", example_input=x, objective=objective).train()


def batch(samples=6):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(samples, 1, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, CLASSES, (samples,), generator=generator)


def with_label(x, label):
    """Put a label, or the neutral one where it is None, in the first values of one sample."""
    labelled = x.clone().flatten()
    for j in range(CLASSES):
        if label is None:
            labelled[j] = 1 / CLASSES
        else:
            labelled[j] = 1.0 if j == label else 0.0
    return labelled.reshape(x.shape)


def layers_of(net):
    """Return the linear layers of the blocks, in order."""
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


def goodnesses(layers, x, reduction="sum"):
    """Return the goodness of each feature block for one sample with its label, by hand."""
    found = []
    h = x.flatten()
    for layer in layers[:-1]:
        h = F.relu(F.linear(h, layer.weight, layer.bias))
        squares = h.square()
        found.append(squares.sum() if reduction == "sum" else squares.mean())
        h = (h / (h.square().mean().sqrt() + 1e-8)).detach()
    return found, h


def wrong_labels(monkeypatch, labels):
    """Let the next step draw these labels."""
    monkeypatch.setattr("sffx.learning.objectives.labelled.other_labels", lambda y, count: labels)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_form", ["logistic", "symba"])
@pytest.mark.parametrize("neutral", [False, True])
def test_gradients_are_those_of_a_loop_by_hand(monkeypatch, reduction, loss_form, neutral):
    net = cut(reduction=reduction, loss_form=loss_form, neutral=neutral, threshold=1.5)
    x, y = batch()
    wrong = (y + 1 + torch.arange(len(y)) % 2) % CLASSES
    wrong_labels(monkeypatch, wrong)
    loss = sffx.local_loss(net, x, y)
    loss.backward()

    layers = layers_of(net)
    own = {p: p.grad for p in net.parameters() if p.grad is not None}
    total = 0.0
    for sample, label, other in zip(x, y, wrong, strict=True):
        positive, _ = goodnesses(layers, with_label(sample, label), reduction)
        negative, _ = goodnesses(layers, with_label(sample, other), reduction)
        for plus, minus in zip(positive, negative, strict=True):
            if loss_form == "symba":
                total += torch.log1p(torch.exp(-4 * (plus - minus)))
            else:
                both = torch.log1p(torch.exp(1.5 - plus)) + torch.log1p(torch.exp(minus - 1.5))
                total += both / 2
        if neutral:
            _, h = goodnesses(layers, with_label(sample, None), reduction)
            logits = F.linear(h, layers[-1].weight, layers[-1].bias)
            total += F.cross_entropy(logits[None], label[None])
    expected = total / len(x)
    torch.testing.assert_close(loss, expected)
    learning = layers if neutral else layers[:-1]
    parameters = [p for layer in learning for p in layer.parameters()]
    gradients = torch.autograd.grad(expected, parameters)
    assert set(own) == set(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(own[parameter], gradient)


def test_peer_normalisation_is_that_of_a_loop_by_hand(monkeypatch):
    net, plain = cut(peer=0.03), cut()
    x, y = batch()
    wrong_labels(monkeypatch, (y + 1) % CLASSES)
    layers = layers_of(net)
    running = [torch.full((size,), 0.5, dtype=torch.float64) for size in (12, 10, 8)]
    for _ in range(2):
        net.zero_grad()
        difference = sffx.local_loss(net, x, y) - sffx.local_loss(plain, x, y).detach()
        difference.backward()
        own = [layer.weight.grad.clone() for layer in layers[:-1]]
        plain.zero_grad()
        sffx.local_loss(plain, x, y).backward()
        h = torch.stack([with_label(sample, label) for sample, label in zip(x, y, strict=True)])
        h = h.flatten(1)
        total = 0.0
        for i, layer in enumerate(layers[:-1]):
            h = F.relu(F.linear(h, layer.weight, layer.bias))
            mean = 0.9 * running[i] + 0.1 * h.mean(0)
            running[i] = mean.detach()
            units = sum((mean.mean() - each) ** 2 for each in mean) / len(mean)
            (gradient,) = torch.autograd.grad(0.03 * units, layer.weight, retain_graph=True)
            of_goodness = layers_of(plain)[i].weight.grad
            torch.testing.assert_close(own[i], of_goodness + gradient)
            total += 0.03 * units.detach()
            h = (h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)).detach()
        torch.testing.assert_close(difference.detach(), total)
    assert "head_0.peers.running_mean" in net.state_dict()


def test_units_of_images_are_channels():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(16, 4))
    net = sffx.transform(model, "layer", torch.zeros(1, 1, 6, 6), objective=ForwardForward(peer=1))
    x, y = batch()
    sffx.local_loss(net.train(), x.float(), y)
    found = net.head_0.peers.running_mean
    assert found.shape == (3,)
    assert not torch.equal(found, torch.full((3,), 0.5))


@pytest.mark.parametrize("samples", [1, 3, 11])
def test_a_prediction_tries_every_label(samples):
    net = cut().eval()
    x, y = batch(samples)
    layers = layers_of(net)
    expected = torch.zeros(3, samples, CLASSES, dtype=torch.float64)
    for n, sample in enumerate(x):
        for label in range(CLASSES):
            found, _ = goodnesses(layers, with_label(sample, label))
            for block, (goodness, size) in enumerate(zip(found, (12, 10, 8), strict=True)):
                expected[block, n, label] = goodness - size
    with torch.no_grad():
        torch.testing.assert_close(sffx.block_scores(net, x)[:-1], expected)
        # The ensemble leaves the first block out.
        torch.testing.assert_close(net(x), expected[1:].mean(0))
    evaluation = sffx.evaluate(net, [(x, y)])
    for block in range(3):
        share = (expected[block].argmax(1) == y).double().mean().item()
        assert evaluation.accuracy[f"block_{block}"] == pytest.approx(share)
    assert "classifier" not in evaluation.accuracy


def test_the_classifier_predicts_from_a_neutral_label():
    net = cut(neutral=True).eval()
    x, _ = batch()
    layers = layers_of(net)
    expected = []
    for sample in x:
        _, h = goodnesses(layers, with_label(sample, None))
        expected.append(F.linear(h, layers[-1].weight, layers[-1].bias))
    with torch.no_grad():
        torch.testing.assert_close(sffx.block_scores(net, x)[-1], torch.stack(expected))


def test_few_rows_run_at_once():
    net = cut().eval()
    x, _ = batch(20)
    rows = []
    net.block_0.register_forward_hook(lambda module, args, y: rows.append(len(y)))
    sffx.block_scores(net, x)
    assert max(rows) <= 20
    assert sum(rows) == 20 * (CLASSES + 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 12), st.integers(1, 20), st.integers(0, 1000))
def test_a_wrong_label_is_never_the_true_one(classes, samples, seed):
    with seeded(seed):
        y = torch.randint(0, classes, (samples,))
        scores = 50 * torch.nn.functional.one_hot(y, classes) + torch.randn(samples, classes)
        for wrong in (other_labels(y, classes), likely_other_labels(y, scores)):
            assert not (wrong == y).any()
            assert wrong.min() >= 0
            assert wrong.max() < classes


def test_every_wrong_label_is_drawn_equally_often():
    with seeded():
        counts = torch.bincount(other_labels(torch.full((6000,), 2), 4), minlength=4)
    assert counts[2] == 0
    assert all(1800 < count < 2200 for count in counts[[0, 1, 3]])


def test_hard_negatives_follow_the_scores_of_the_net(monkeypatch):
    net = cut(negatives="hard")
    x, y = batch()
    seen = []

    def noted(y, scores):
        seen.append(scores)
        return (y + 1) % CLASSES

    monkeypatch.setattr("sffx.learning.objectives.labelled.likely_other_labels", noted)
    sffx.local_loss(net, x, y)
    assert net.training
    with torch.no_grad():
        torch.testing.assert_close(seen[0], net.eval()(x))


def test_waves_differ_by_class_and_reach_every_pixel():
    codes = LABEL_CODES["waves"].codes((1, 9, 7), 10)
    assert codes.shape == (11, 9, 7)
    assert not codes[-1].any()
    for one in range(10):
        for other in range(one):
            assert (codes[one] - codes[other]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "threshold is -1.0. Hint: pass a positive number"),
        ({"labels": "words"}, "labels is 'words'. Hint: choose one of 'pixels', 'waves'"),
        ({"negatives": "soft"}, "negatives is 'soft'"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"loss_form": "hinge"}, "loss_form is 'hinge'"),
        ({"alpha": 0}, "alpha is 0"),
        ({"peer": -0.1}, "peer is -0.1. Hint: pass a number, 0 or more"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        ForwardForward(**options)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_hard_negatives_of_a_net_that_diverges_are_still_wrong_labels(number):
    y = torch.arange(12) % 3
    scores = torch.zeros(12, 3)
    scores[::2] = number
    scores[1::4, 0] = number
    assert (likely_other_labels(y, scores) != y).all()


@pytest.mark.parametrize("labels", ["pixels", "waves"])
def test_images_of_another_size_than_the_example(labels):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    objective = ForwardForward(labels=labels, reduction="mean")
    net = sffx.transform(model, "layer", torch.zeros(1, 1, 8, 8), objective=objective).train()
    x, y = torch.rand(3, 1, 12, 10), torch.arange(3)
    sffx.local_loss(net, x, y).backward()
    scores = net.eval()(x)
    codes = LABEL_CODES[labels].codes((1, 12, 10), 3)
    for label in range(3):
        labelled = LABEL_CODES[labels].put(x, codes[label].expand(3, *codes.shape[1:]))
        goodness = net.block_0(labelled).square().flatten(1).mean(1) - 1
        torch.testing.assert_close(scores[:, label], goodness)
    for mode in (True, False):
        net.train(mode)
        with pytest.raises(InputError, match=r"a sample has .*Hint: "):
            sffx.local_loss(net, x[:, :, :1, :3], y) if mode else net(x[:, :, :1, :3])


def small(inputs, classes):
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, classes))


@pytest.mark.parametrize(
    ("inputs", "options", "task", "message"),
    [
        (4, {}, None, "4 values, but a label takes the first 4"),
        (9, {"labels": "waves"}, None, "labels='waves' are waves over images"),
        (
            9,
            {},
            sffx.tasks.Regression(),
            r"learns classes of a sample, not sffx\.tasks\.Regression",
        ),
    ],
)
def test_models_that_cannot_learn_by_it(inputs, options, task, message):
    objective = ForwardForward(**options)
    example = torch.zeros(1, inputs)
    with pytest.raises(InputError, match=message):
        sffx.transform(small(inputs, 4), "layer", example, objective=objective, task=task)


def test_inputs_that_hold_no_label():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(54, 8), nn.Linear(8, 4))
    with pytest.raises(InputError, match="which holds int64, not floats"):
        sffx.transform(model, "layer", torch.zeros(1, 9, dtype=torch.long), objective="ff")


def test_targets_and_losses_that_cannot_be_used():
    net = cut()
    x, y = batch()
    with pytest.raises(InputError, match=r"y has dtype torch.float64|y has shape \(6, 4\)"):
        sffx.local_loss(net, x, torch.full((6, CLASSES), 0.25, dtype=torch.float64))
    with pytest.raises(InputError, match="the objective 'ff' has a loss of its own"):
        sffx.local_loss(net, x, y, nn.CrossEntropyLoss())
    with pytest.raises(InputError, match="blocks names 'classifier'"):
        sffx.local_loss(net, x, y, blocks=["classifier"])
