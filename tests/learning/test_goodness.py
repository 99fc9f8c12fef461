from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.learning.goodness import (
    CHANNELS,
    CONVOLUTION,
    ROWS,
    CwCGoodness,
    DirectGoodness,
    SecondMomentGoodness,
    SFFGoodness,
    _parts,
    moment_is_cheaper,
    pointwise_goodness,
    token_goodness,
)
from sffx.memory.count import count_memory

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
    monkeypatch.setattr("sffx.learning.goodness._SMALL", 1)
    inputs = example(5, 4, 6, classes)
    assert len(_parts(inputs[0], classes * 6)) == {3: 1, 12: 5, 40: 5}[classes]
    upstream = torch.randn(
        5, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    found, expected = FORMS[form](*inputs), by_definition(*inputs)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(torch.autograd.grad(g, inputs, upstream) for g in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("channels", "positions"), [(32, 1024), (256, 64)]
)  # second moment; direct, with z computed again
def test_no_tensor_over_classes_and_positions_is_made(channels, positions):
    classes = 2000
    head = SFFGoodness(channels, classes, spatial=1)
    y = torch.randn(16, channels, positions, requires_grad=True)
    counted = count_memory(lambda: head(y).sum().backward(), model=head)
    z = 4 * 16 * classes * positions
    assert counted.activations < z / 4 + 3 * 4 * y.numel() + 6 * 4 * 16 * classes


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [10, 1000])
def test_low_precision_inputs_are_accumulated_in_float32(dtype, classes):
    head = SFFGoodness(32, classes, spatial=2)
    y = torch.randn(4, 32, 14, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = head(y)
    assert found.dtype == torch.float32
    exact = by_definition(
        y.double().flatten(2), head.weight.double().flatten(1), head.bias.double()
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(y), found)


LAYOUTS = {
    "B, C": ((6,), 1),
    "B, C, L": ((6, 9), 1),
    "B, C, H, W": ((6, 4, 5), 1),
    "B, C, T, H, W": ((6, 2, 3, 4), 1),
    "B, T, C": ((9, 6), 2),
    "B, H, W, C": ((4, 5, 6), 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [3, 200])
def test_every_layout_has_the_goodness_of_its_positions(layout, classes):
    shape, axis = LAYOUTS[layout]
    y = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    head = SFFGoodness(6, classes, channel_axis=axis, spatial=len(shape) - 1).double()
    rows = y.movedim(axis, -1).reshape(4, -1, 6).mT
    expected = by_definition(rows, head.weight.flatten(1), head.bias)
    torch.testing.assert_close(head(y), expected)
    found, wanted = (
        torch.autograd.grad(g.square().sum(), [y, head.weight, head.bias])
        for g in (head(y), expected)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_channels_last_memory_gives_the_same():
    head = SFFGoodness(16, 10).double()
    y = torch.randn(4, 16, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(head(y.to(memory_format=torch.channels_last)), head(y))


@pytest.mark.parametrize(("spatial", "convolution"), [(1, F.conv1d), (2, F.conv2d), (3, F.conv3d)])
def test_larger_kernels_convolve_with_padding(spatial, convolution):
    head = SFFGoodness(5, 3, spatial=spatial, kernel_size=3)
    y = torch.randn(2, 5, *[4] * spatial)
    z = convolution(y, head.weight, head.bias, padding=1)
    assert z.shape[2:] == y.shape[2:]
    torch.testing.assert_close(head(y), z.square().flatten(2).mean(2))


@pytest.mark.parametrize("classes", [3, 40])  # z kept; z computed again, part by part
def test_the_gradients_of_larger_kernels(classes, monkeypatch):
    monkeypatch.setattr("sffx.learning.goodness._SMALL", 1)
    head = SFFGoodness(5, classes, kernel_size=3).double()
    y = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(y, head.weight, head.bias, padding=1).square().flatten(2).mean(2)
    upstream = torch.randn(3, classes, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad(g, [y, head.weight, head.bias], upstream) for g in (head(y), plain)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_larger_kernels_make_no_large_tensor_either():
    head = SFFGoodness(16, 1000, kernel_size=3)
    y = torch.randn(16, 16, 16, 16, requires_grad=True)
    counted = count_memory(lambda: head(y).sum().backward(), model=head)
    z = 4 * 16 * 1000 * 256
    assert counted.activations < z / 4


def test_larger_kernels_on_tokens_convolve_over_the_tokens():
    head = SFFGoodness(5, 3, channel_axis=2, spatial=1, kernel_size=3)
    y = torch.randn(2, 7, 5)
    torch.testing.assert_close(
        head(y), F.conv1d(y.mT, head.weight, head.bias, padding=1).square().mean(2)
    )


def test_initialised_as_torch_initialises_a_convolution():
    torch.manual_seed(0)
    head = SFFGoodness(12, 7, kernel_size=3)
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(12, 7, 3)
    assert torch.equal(head.weight, convolution.weight)
    assert torch.equal(head.bias, convolution.bias)


def test_the_cheaper_form_is_taken():
    assert moment_is_cheaper(64, 1000, 56 * 56)
    assert not moment_is_cheaper(64, 10, 56 * 56)
    assert not moment_is_cheaper(2048, 1000, 49)
    y, weight, bias = example(2, 4, 50, 300)
    assert (
        type(pointwise_goodness(y, weight, bias).grad_fn).__name__ == "SecondMomentGoodnessBackward"
    )
    assert pointwise_goodness(*example(2, 40, 50, 3)).grad_fn.form is CHANNELS
    assert pointwise_goodness(*example(2, 40, 4, 3)).grad_fn.form is ROWS
    tokens, weight, bias = example(2, 50, 40, 3)[0].mT, *example(2, 40, 4, 3)[1:]
    assert pointwise_goodness(tokens, weight, bias).grad_fn.form is ROWS


@pytest.mark.parametrize("kernel_size", [0, 2, -1, 1.5, "3"])
def test_kernels_that_cannot_be(kernel_size):
    with pytest.raises(InputError, match="Hint: pass an odd positive integer"):
        SFFGoodness(4, 2, kernel_size=kernel_size)


def test_cwc_by_hand():
    y = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])[:, :, None, None].expand(1, 5, 2, 2).clone()
    y[..., 0] = 0  # half of the positions
    torch.testing.assert_close(
        CwCGoodness(5, 2)(y), torch.tensor([[(1 + 4 + 9) / 3 / 2, (16 + 25) / 2 / 2]])
    )


def test_cwc_splits_evenly_and_gives_the_first_groups_the_rest():
    assert CwCGoodness(11, 4).groups.ne(0).sum(0).tolist() == [3, 3, 3, 2]
    assert CwCGoodness(8, 4).groups.sum(0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cwc_gradients(layout):
    shape, axis = LAYOUTS[layout]
    head = CwCGoodness(6, 3, axis).double()
    y = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    expected = y.movedim(axis, 1).unflatten(1, (3, 2)).square().flatten(2).mean(2)
    torch.testing.assert_close(head(y), expected)
    assert torch.autograd.gradcheck(head, y)


def test_cwc_needs_as_many_channels_as_classes():
    with pytest.raises(
        InputError,
        match="CwC needs a channel for each class, but a block has 4 channels for 5 classes",
    ):
        CwCGoodness(4, 5)


def with_padding() -> tuple[Tensor, Tensor]:
    """Values (4, 7, 6) of tokens, of which the padding is large, and their mask: behind, before, between, none."""
    y = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor(
        [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1]]
    )
    return torch.where(mask.bool()[:, :, None], y, 1e3).requires_grad_(), mask


def alone(head: nn.Module, y: Tensor, mask: Tensor) -> Tensor:
    """The goodness of each sample's real tokens alone; with a kernel, of zeros in place of the others, which are left out of the mean."""
    if getattr(head, "kernel_size", 1) == 1:
        return torch.cat(
            [head(sample[real.bool()][None]) for sample, real in zip(y, mask, strict=True)]
        )
    z = F.conv1d((y * mask[:, :, None]).mT, head.weight, head.bias, padding=head.kernel_size // 2)
    return (z.square() * mask[:, None]).sum(2) / mask.sum(1, keepdim=True)


HEADS = {
    "rows": lambda: SFFGoodness(6, 4, channel_axis=2, spatial=1),
    "moment": lambda: SFFGoodness(6, 200, channel_axis=2, spatial=1),
    "kernel": lambda: SFFGoodness(6, 4, channel_axis=2, spatial=1, kernel_size=3),
    "cwc": lambda: CwCGoodness(6, 4, channel_axis=2),
}


@pytest.mark.parametrize("name", HEADS)
def test_padding_changes_neither_the_goodness_nor_a_gradient(name):
    torch.manual_seed(0)
    head = HEADS[name]().double()
    y, mask = with_padding()
    found, expected = head(y, mask), alone(head, y, mask)
    torch.testing.assert_close(found, expected)
    inputs = [y, *head.parameters()]
    upstream = torch.randn(found.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(g, inputs, upstream) for g in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert not gradients[0][0][~mask.bool()].any()
    torch.testing.assert_close(
        head(y[:, [*range(7), 6, 6]], F.pad(mask, (0, 2))), expected
    )  # two more of padding
    torch.testing.assert_close(head(y, torch.ones_like(mask)), head(y))


@pytest.mark.parametrize("classes", [4, 200])  # direct; second moment
def test_gradcheck_with_padding(classes):
    assert moment_is_cheaper(4, classes, 5) == (classes == 200)
    y, weight, bias = example(3, 3, 5, classes)
    real = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(
        lambda *inputs: token_goodness(*inputs, real),
        (y.mT.detach().requires_grad_(), weight, bias),
    )


def test_padding_that_is_not_finite_and_a_sample_of_nothing_else():
    head = SFFGoodness(6, 4, channel_axis=2, spatial=1)
    y = torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = head(y.masked_fill(~mask.bool()[:, :, None], torch.nan), mask)
    torch.testing.assert_close(found[:1], head(y[:1, :2]))
    assert not found[1].any()
