"""Cosines and hidden units against their definitions in plain torch."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.directions import EPS, cosines, hidden_units, normed


def of_length_one(rows: Tensor) -> Tensor:
    mean_square = rows.square().mean(1, keepdim=True)
    return rows / torch.sqrt(mean_square + EPS) / math.sqrt(rows.shape[1])


def by_definition(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    centred = features - features.mean(1, keepdim=True)
    return scale * of_length_one(centred) @ of_length_one(weight).t()


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = 3 + torch.randn(4, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    # EPS matters where a row is nearly zero, and a row of zeros has no direction at all.
    weight[1] *= 1e-3
    weight[2] = 0
    return features.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("compiles", [False, True])
def test_cosines_have_the_values_and_gradients_of_the_definition(compiles):
    inputs = example()
    expected = by_definition(*inputs, 10.0)
    with mock.patch("torch.compiler.is_compiling", return_value=compiles):
        found = cosines(normed(inputs[0]), inputs[1], 10.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(4, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad(value, inputs, upstream) for value in (found, expected)]
    for own, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compiles", [False, True])
def test_hidden_units_are_those_of_a_layer_and_a_relu_to_the_bit(compiles):
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    layer = torch.nn.Linear(7, 3).double()
    inputs = [x, layer.weight, layer.bias]
    with mock.patch("torch.compiler.is_compiling", return_value=compiles):
        found = hidden_units(*inputs)
    expected = F.relu(layer(x))
    assert torch.equal(found, expected)
    upstream = torch.randn(4, 3, dtype=torch.float64)
    gradients = [torch.autograd.grad(value, inputs, upstream) for value in (found, expected)]
    for own, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = list(example())
    inputs[frozen] = inputs[frozen].detach()
    learns = inputs[1 - frozen]
    (gradient,) = torch.autograd.grad(cosines(normed(inputs[0]), inputs[1], 2.0).sum(), learns)
    assert gradient.shape == learns.shape
