"""The auxiliary convolution's goodness against its definition in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.learning.convolution import SFFGoodness
from sffx.memory.count import count_memory
from tests.kernels.test_goodness import by_definition
from tests.learning.values import LAYOUTS, with_padding


@pytest.mark.parametrize(
    ("channels", "positions"), [(32, 1024), (256, 64)]
)  # second moment; direct, with z computed again
def test_no_tensor_over_classes_and_positions_is_made(channels, positions):
    classes = 2000
    head = SFFGoodness(channels, classes, spatial=1)
    y = torch.randn(16, channels, positions, requires_grad=True)
    counted = count_memory(lambda: head(y).sum().backward(), model=head)
    z = 4 * 16 * classes * positions
    # A slice of z may be as large as the weight, whose gradient lies in memory beside it.
    slice_of_z = 4 * max(y.numel(), head.weight.numel())
    assert slice_of_z < z / 3
    assert counted.activations < z / 4 + 2 * 4 * y.numel() + slice_of_z + 6 * 4 * 16 * classes


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [3, 200])
def test_every_layout_has_the_goodness_of_its_positions(layout, classes):
    shape, axis = LAYOUTS[layout]
    y = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    head = SFFGoodness(6, classes, channel_axis=axis, spatial=len(shape) - 1).double()
    rows = y.movedim(axis, -1).reshape(4, -1, 6).mT
    expected = by_definition(rows, head.weight.flatten(1), head.bias)
    torch.testing.assert_close(head(y), expected)
    inputs = [y, head.weight, head.bias]
    found = torch.autograd.grad(head(y).square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
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
    monkeypatch.setattr("sffx.kernels.batch_slices._SMALL", 1)
    head = SFFGoodness(5, classes, kernel_size=3).double()
    y = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(y, head.weight, head.bias, padding=1).square().flatten(2).mean(2)
    upstream = torch.randn(3, classes, dtype=torch.float64)
    inputs = [y, head.weight, head.bias]
    found = torch.autograd.grad(head(y), inputs, upstream)
    wanted = torch.autograd.grad(plain, inputs, upstream)
    for a, b in zip(found, wanted, strict=True):
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


@pytest.mark.parametrize("kernel_size", [0, 2, -1, 1.5, "3"])
def test_kernels_that_cannot_be(kernel_size):
    with pytest.raises(InputError, match="Hint: pass an odd positive integer"):
        SFFGoodness(4, 2, kernel_size=kernel_size)


def test_more_than_three_axes_of_space_have_kernels_of_1_only():
    y = torch.randn(2, 5, 2, 2, 2, 2)
    head = SFFGoodness(5, 3, spatial=4)
    torch.testing.assert_close(
        head(y), by_definition(y.flatten(2), head.weight.flatten(1), head.bias)
    )
    with pytest.raises(InputError, match="a value with 4 axes of space has no such convolution"):
        SFFGoodness(5, 3, spatial=4, kernel_size=3)


def over_real_tokens(head: SFFGoodness, y: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens of the squares of a convolution that reads zeros at the others."""
    weight = head.weight if head.weight.ndim == 3 else head.weight[:, :, None]
    padding = head.kernel_size // 2
    z = F.conv1d((y * mask[:, :, None]).mT, weight, head.bias, padding=padding)
    return (z.square() * mask[:, None]).sum(2) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("classes", "kernel_size"), [(4, 1), (200, 1), (4, 3)], ids=["rows", "moment", "kernel"]
)
def test_padding_changes_neither_the_goodness_nor_a_gradient(classes, kernel_size):
    torch.manual_seed(0)
    head = SFFGoodness(6, classes, channel_axis=2, spatial=1, kernel_size=kernel_size).double()
    y, mask = with_padding()
    found, expected = head(y, mask), over_real_tokens(head, y, mask)
    torch.testing.assert_close(found, expected)
    inputs = [y, head.weight, head.bias]
    upstream = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not gradients[0][~mask.bool()].any()
    more_padding = head(y[:, [*range(7), 6, 6]], F.pad(mask, (0, 2)))
    torch.testing.assert_close(more_padding, expected)
    torch.testing.assert_close(head(y, torch.ones_like(mask)), head(y))


def test_padding_that_is_not_finite_and_a_sample_of_nothing_else():
    head = SFFGoodness(6, 4, channel_axis=2, spatial=1)
    y = torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = head(y.masked_fill(~mask.bool()[:, :, None], torch.nan), mask)
    torch.testing.assert_close(found[:1], head(y[:1, :2]))
    assert not found[1].any()
