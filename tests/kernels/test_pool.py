"""The memory-saving max pool against that of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sffx.kernels.pool import MemorySavingMaxPool2d

SETTINGS = {
    "2": {"kernel_size": 2},
    "3, 2, 1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "pairs": {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 1)},
    "ceil": {"kernel_size": 2, "stride": 2, "ceil_mode": True},
}


def kept_of(function, size: int) -> int:
    """Return how many tensors of a size the function keeps for the backward pass."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(tensor.numel() == size for tensor in kept.values())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_gradient_are_those_of_torch(setting, layout):
    saving, plain = MemorySavingMaxPool2d(**SETTINGS[setting]), nn.MaxPool2d(**SETTINGS[setting])
    x = torch.randn(2, 3, 9, 7).to(memory_format=layout).requires_grad_()
    found, expected = saving(x), plain(x)
    assert torch.equal(found, expected)
    upstream = torch.randn(expected.shape)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(gradient, wanted)
    assert gradient.stride() == wanted.stride()


def test_the_input_is_not_kept():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    saving, plain = MemorySavingMaxPool2d(2), nn.MaxPool2d(2)
    assert kept_of(lambda: plain(x * 1), x.numel()) == 1
    assert kept_of(lambda: saving(x * 1), x.numel()) == 0


def test_the_input_may_be_passed_by_name():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert torch.equal(MemorySavingMaxPool2d(2)(input=x), nn.MaxPool2d(2)(input=x))


def test_a_sample_without_a_batch_is_pooled_by_torch():
    x = torch.randn(3, 8, 8, requires_grad=True)
    assert torch.equal(MemorySavingMaxPool2d(2)(x), nn.MaxPool2d(2)(x))
