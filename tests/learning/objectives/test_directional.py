"""CFFA against a hand-written loop in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx import InputError
from sffx.objectives import CFFA
from tests.toys import kept

CLASSES = 3


@kept
def cut(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, CLASSES)
    ).double()
    example = torch.zeros(1, 9, dtype=torch.float64)
    return sffx.transform(model, "layer", example, objective=CFFA(**options)).train()


def with_label(sample, label):
    labelled = sample.clone()
    labelled[:CLASSES] = F.one_hot(torch.as_tensor(label), CLASSES)
    return labelled


def lengths(net, sample):
    """Return the length of each block's output, of one sample with its label."""
    h = sample
    found = []
    for block in (net.block_0, net.block_1):
        h = block(h[None])[0]
        length = sum(each**2 for each in h) ** 0.5
        found.append(length)
        h = (h / length * math.sqrt(len(h))).detach()
    return found


def test_gradients_are_those_of_a_loop_by_hand(monkeypatch):
    net = cut(threshold=1.5)
    x = torch.rand(5, 9, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    wrong = (y + 1) % CLASSES
    monkeypatch.setattr("sffx.learning.objectives.labelled.other_labels", lambda y, count: wrong)
    loss = sffx.local_loss(net, x, y)
    loss.backward()

    total = 0.0
    thresholds = [net.head_0.threshold, net.head_1.threshold]
    for sample, label, other in zip(x, y, wrong, strict=True):
        good = lengths(net, with_label(sample, label))
        bad = lengths(net, with_label(sample, other))
        for plus, minus, theta in zip(good, bad, thresholds, strict=True):
            total = total + torch.log1p(torch.exp(theta - plus)) / 2
            total = total + torch.log1p(torch.exp(minus - theta)) / 2
    expected = total.sum() / len(x)
    torch.testing.assert_close(loss, expected)
    parameters = [*net.block_0.parameters(), *net.block_1.parameters(), *thresholds]
    assert {p for p in net.parameters() if p.grad is not None} == set(parameters)
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_prediction_leaves_the_first_block_out():
    net = cut().eval()
    x = torch.rand(4, 9, dtype=torch.float64)
    expected = torch.zeros(4, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        for n, sample in enumerate(x):
            for label in range(CLASSES):
                expected[n, label] = lengths(net, with_label(sample, label))[1] - math.sqrt(6)
        torch.testing.assert_close(net(x), expected)


def test_an_output_of_zeros_has_a_gradient_of_zeros():
    head = cut().head_0.train()
    y = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    head(y).sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("threshold", [-1, 0, "long"])
def test_thresholds_that_cannot_be_used(threshold):
    with pytest.raises(InputError, match=r"threshold is .*Hint: pass a positive number"):
        CFFA(threshold=threshold)
