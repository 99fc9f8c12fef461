from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sffx.learning.norms import SampleNorm


def test_each_sample_is_normalised_over_all_its_values():
    y = torch.randn(3, 4, 5, 5) * 3 + 2
    torch.testing.assert_close(SampleNorm()(y), F.layer_norm(y, (4, 5, 5)))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 4, 5, 6), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
    ids=["images", "volumes"],
)
def test_channels_last_is_normalised_as_it_lies(shape, layout):
    y = (torch.randn(shape, dtype=torch.float64) * 3 + 2).to(memory_format=layout).requires_grad_()
    found, expected = SampleNorm()(y), F.layer_norm(y, shape[1:])
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(shape, dtype=torch.float64)
    a, b = (torch.autograd.grad((out * weight).sum(), y)[0] for out in (found, expected))
    torch.testing.assert_close(a, b)


def test_padding_takes_no_part_and_becomes_zero():
    y = torch.randn(2, 5, 6) * 3 + 2
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]])
    y = y.masked_fill(~mask.bool()[:, :, None], torch.nan)
    found = SampleNorm()(y, mask)
    torch.testing.assert_close(found[:1, :2], SampleNorm()(y[:1, :2]))
    torch.testing.assert_close(found[1:, 1:], SampleNorm()(y[1:, 1:]))
    assert not found[~mask.bool()].any()


def test_a_mask_of_ones_is_none():
    y = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    found = SampleNorm()(y, torch.ones(2, 5))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, SampleNorm()(y))


def test_the_norm_takes_away_mean_and_length_of_each_sample():
    y = torch.randn(4, 3, 5, 5) * torch.tensor([1.0, 10.0, 100.0, 0.1])[:, None, None, None] + 7
    normed = SampleNorm(eps=0)(y).flatten(1)
    torch.testing.assert_close(normed.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.square().mean(1), torch.ones(4))
