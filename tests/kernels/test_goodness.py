"""Each form of the SFF goodness against its definition in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sffx.kernels.batch_slices import slices_within
from sffx.kernels.direct_form import CHANNELS, CONVOLUTION, ROWS, DirectGoodness
from sffx.kernels.goodness import moment_is_cheaper, pointwise_goodness, token_goodness
from sffx.kernels.moment_form import SecondMomentGoodness

FORMS = {
    "direct": lambda y, weight, bias: DirectGoodness.apply(y, weight, bias, CHANNELS),
    "rows": lambda y, weight, bias: DirectGoodness.apply(y.mT.contiguous(), weight, bias, ROWS),
    "convolution": lambda y, weight, bias: DirectGoodness.apply(
        y, weight[:, :, None], bias, CONVOLUTION
    ),
    "moment": SecondMomentGoodness.apply,
}


def by_definition(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The goodness as section 4.3 writes it, in plain torch: (B, C, P), (J, C), (J,) to (B, J)."""
    return (torch.einsum("jc,bcp->bjp", weight, y) + bias[:, None]).square().mean(2)


def example(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, channels, positions, classes = shape
    y = torch.randn(batch, channels, positions, generator=generator, dtype=torch.float64) + 0.5
    weight = (
        torch.randn(classes, channels, generator=generator, dtype=torch.float64) / channels**0.5
    )
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (y, weight, bias))  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_the_value_and_gradients_of_the_definition(form):
    inputs = example(3, 5, 7, 4)
    upstream = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = FORMS[form](*inputs), by_definition(*inputs)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(g, inputs, upstream) for g in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [4, 40])
def test_empty_batch(form, classes):
    inputs = example(0, 5, 7, classes)
    found = FORMS[form](*inputs)
    assert found.shape == (0, classes)
    for gradient, value in zip(torch.autograd.grad(found.sum(), inputs), inputs, strict=True):
        assert gradient.shape == value.shape
        assert not gradient.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "classes", [3, 12, 40]
)  # one part; several, with z kept; several, with z computed again
def test_a_batch_taken_in_parts_has_the_same_value_and_gradients(form, classes, monkeypatch):
    monkeypatch.setattr("sffx.kernels.batch_slices._SMALL", 1)
    inputs = example(5, 4, 6, classes)
    assert len(slices_within(inputs[0], classes * 6)) == {3: 1, 12: 5, 40: 5}[classes]
    upstream = torch.randn(
        5, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    found, expected = FORMS[form](*inputs), by_definition(*inputs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(torch.autograd.grad(g, inputs, upstream) for g in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1)])
def test_gradcheck(form, frozen):
    inputs = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(example(2, 3, 4, 5))]
    assert torch.autograd.gradcheck(FORMS[form], inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_position_and_a_single_class(form):
    for shape in ((4, 3, 1, 2), (4, 3, 5, 1), (1, 1, 1, 1)):
        inputs = example(*shape)
        torch.testing.assert_close(FORMS[form](*inputs), by_definition(*inputs))


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_as_exact_as_the_definition_in_float32(form):
    exact = by_definition(*example(8, 64, 196, 100))
    single = example(8, 64, 196, 100, dtype=torch.float32)
    own = (by_definition(*single).double() - exact).abs().max()
    assert (FORMS[form](*single).double() - exact).abs().max() < 4 * own + 1e-6


def test_the_moment_form_is_exact_where_the_mean_dominates():
    generator = torch.Generator().manual_seed(0)
    y = 100 + 0.01 * torch.randn(2, 16, 4096, generator=generator, dtype=torch.float64)
    weight = torch.randn(100, 16, generator=generator, dtype=torch.float64) / 4
    bias = -(weight * 100).sum(1)
    exact = by_definition(y, weight, bias)
    found = SecondMomentGoodness.apply(y.float(), weight.float(), bias.float())
    direct = FORMS["direct"](y.float(), weight.float(), bias.float())
    assert (found - exact).abs().max() < 4 * (direct - exact).abs().max() + 1e-7


def test_the_cheaper_form_is_taken():
    assert moment_is_cheaper(64, 1000, 56 * 56)
    assert not moment_is_cheaper(64, 10, 56 * 56)
    assert not moment_is_cheaper(2048, 1000, 49)
    # Few channels and few classes: a centred copy of y would be most of the cost.
    assert not moment_is_cheaper(16, 10, 256)
    y, weight, bias = example(2, 4, 50, 300)
    assert (
        type(pointwise_goodness(y, weight, bias).grad_fn).__name__ == "SecondMomentGoodnessBackward"
    )
    assert pointwise_goodness(*example(2, 40, 50, 3)).grad_fn.form is CHANNELS
    assert pointwise_goodness(*example(2, 40, 4, 3)).grad_fn.form is ROWS
    tokens, weight, bias = example(2, 50, 40, 3)[0].mT, *example(2, 40, 4, 3)[1:]
    assert pointwise_goodness(tokens, weight, bias).grad_fn.form is ROWS


@pytest.mark.parametrize("classes", [4, 200])  # direct; second moment
def test_gradcheck_with_padding(classes):
    assert moment_is_cheaper(4, classes, 5) == (classes == 200)
    y, weight, bias = example(3, 3, 5, classes)
    real = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(
        lambda *inputs: token_goodness(*inputs, real),
        (y.mT.detach().requires_grad_(), weight, bias),
    )
