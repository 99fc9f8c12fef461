"""The channel-wise competitive goodness against its definition in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sffx.errors import InputError
from sffx.learning.channelwise import CwCGoodness
from tests.learning.values import LAYOUTS, with_padding


def test_by_hand():
    y = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])[:, :, None, None].expand(1, 5, 2, 2).clone()
    y[..., 0] = 0  # half of the positions
    torch.testing.assert_close(
        CwCGoodness(5, 2)(y), torch.tensor([[(1 + 4 + 9) / 3 / 2, (16 + 25) / 2 / 2]])
    )


def test_splits_evenly_and_gives_the_first_groups_the_rest():
    assert CwCGoodness(11, 4).groups.sum(0).tolist() == [3, 3, 3, 2]
    assert CwCGoodness(8, 4).groups.sum(0).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("superclass_of", [None, (0, 0, 1)])
def test_a_cast_net_has_the_same_groups(dtype, superclass_of):
    y = torch.randn(4, 7, 3, 3).to(dtype)
    # Each class is one of 3 or 2 groups of 7 channels, so some shares are 1/3.
    head = CwCGoodness(7, 3, superclass_of=superclass_of)
    wide = torch.promote_types(dtype, torch.float32)
    expected = head(y.to(wide))
    assert torch.equal(copy.deepcopy(head).to(dtype)(y), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradients_in_every_layout(layout):
    shape, axis = LAYOUTS[layout]
    head = CwCGoodness(6, 3, axis).double()
    y = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    expected = y.movedim(axis, 1).unflatten(1, (3, 2)).square().flatten(2).mean(2)
    torch.testing.assert_close(head(y), expected)
    assert torch.autograd.gradcheck(head, y)


def test_needs_as_many_channels_as_classes():
    with pytest.raises(
        InputError,
        match="CwC needs a channel for each class, but a block has 4 channels for 5 classes",
    ):
        CwCGoodness(4, 5)


def test_padding_changes_neither_the_goodness_nor_a_gradient():
    head = CwCGoodness(6, 4, channel_axis=2).double()
    y, mask = with_padding()
    samples = zip(y, mask.bool(), strict=True)
    expected = torch.cat([head(sample[real][None]) for sample, real in samples])
    found = head(y, mask)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(found, y, upstream)
    (wanted,) = torch.autograd.grad(expected, y, upstream)
    torch.testing.assert_close(gradient, wanted)
    assert not gradient[~mask.bool()].any()
    more_padding = head(y[:, [*range(7), 6, 6]], F.pad(mask, (0, 2)))
    torch.testing.assert_close(more_padding, expected)
    torch.testing.assert_close(head(y, torch.ones_like(mask)), head(y))
