"""Memory-saving activations against those of torch, and when they write over their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sffx.kernels.activation import (
    MEMORY_SAVING,
    NAMES,
    MemorySavingGELU,
    MemorySavingHardswish,
    MemorySavingReLU,
    MemorySavingSiLU,
    gradients_are_private,
    private_gradients,
)

PAIRS = {
    "relu": (MemorySavingReLU(), nn.ReLU()),
    "relu in place": (MemorySavingReLU(inplace=True), nn.ReLU(inplace=True)),
    "hardswish": (MemorySavingHardswish(), nn.Hardswish()),
    "silu": (MemorySavingSiLU(), nn.SiLU()),
    "gelu": (MemorySavingGELU(), nn.GELU()),
}


class Given(torch.autograd.Function):
    """The identity, whose backward pass gives a tensor that the test knows."""

    @staticmethod
    def forward(ctx, y: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return y.view_as(y)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def values() -> Tensor:
    """(4, 5, 6), on both sides of every kink."""
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)


def gradient_through(activation: nn.Module, upstream: Tensor) -> Tensor:
    x = values().requires_grad_()
    (found,) = torch.autograd.grad(Given.apply(activation(x * 1), upstream).sum(), x)
    return found


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("private", [False, True])
def test_value_and_gradient_are_those_of_torch(name, private):
    saving, plain = PAIRS[name]
    upstream = values().flip(0)
    with private_gradients(private):
        torch.testing.assert_close(saving(values()), plain(values()), rtol=0, atol=0)
        found = gradient_through(saving, upstream.clone())
    assert torch.equal(found, gradient_through(plain, upstream))


@pytest.mark.parametrize("name", PAIRS)
def test_the_gradient_is_written_over_only_where_it_is_private(name):
    saving, plain = PAIRS[name]
    upstream = values().flip(0)
    expected = gradient_through(plain, upstream)
    given = upstream.clone()
    gradient_through(saving, given)
    assert torch.equal(given, upstream)
    with private_gradients():
        gradient_through(saving, given)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("name", PAIRS)
def test_a_gradient_with_other_strides_is_left_alone(name):
    saving, plain = PAIRS[name]
    broadcast = values()[:1].expand(4, 5, 6)
    before = broadcast.clone()
    with private_gradients():
        found = gradient_through(saving, broadcast)
    assert torch.equal(broadcast, before)
    assert torch.equal(found, gradient_through(plain, broadcast))


def test_a_promise_holds_inside_and_can_be_taken_back():
    assert not gradients_are_private()
    with private_gradients():
        assert gradients_are_private()
        with private_gradients(False):
            assert not gradients_are_private()
        assert gradients_are_private()
    assert not gradients_are_private()


def test_each_activation_has_a_memory_saving_class_of_its_kind():
    assert set(MEMORY_SAVING) == set(NAMES)
    for kind, saving in MEMORY_SAVING.items():
        made = saving().double()
        compute = kind() if isinstance(kind, type) else kind
        assert torch.equal(made(values()), compute(values()))
