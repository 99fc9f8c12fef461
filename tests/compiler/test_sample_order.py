"""Between a change of the order of samples and its end no cut lies: scores would be of others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError, TraceError


class Reorders(nn.Module):
    """Four layers; the two in the middle see the samples in another order."""

    def __init__(self, there, back):
        super().__init__()
        self.there, self.back = there, back
        self.first, self.a, self.b, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        x = self.first(x).relu()
        x, state = self.there(x, key)
        x = self.b(self.a(x).relu()).relu()
        return self.head(self.last(self.back(x, state)).relu())


def _placed(x: Tensor, order: Tensor) -> Tensor:
    placed = torch.zeros_like(x)
    placed[order] = x
    return placed


def _sorted(x, key):
    order = key.sort(descending=True)[1]
    return x[order], order


# What changes the order, and what brings it back.
CHANGES = {
    "index": (_sorted, lambda x, order: x[order.argsort()]),
    "columns": (
        lambda x, key: (x[key.argsort(), 0:6], key.argsort()),
        lambda x, order: torch.stack([x[order.argsort(), i] for i in range(6)], 1),
    ),
    "new axis": (
        lambda x, key: (x[None, key.argsort()][0], key.argsort()),
        lambda x, order: x[..., None][order.argsort(), ..., 0],
    ),
    "place": (_sorted, _placed),
    "index_copy": (_sorted, lambda x, order: torch.zeros_like(x).index_copy(0, order, x)),
    "index_select": (
        lambda x, key: (x.index_select(0, key.argsort()), key.argsort()),
        lambda x, order: torch.index_select(x, 0, order.argsort()),
    ),
    "gather": (
        lambda x, key: (x.gather(0, key.argsort()[:, None].expand_as(x)), key.argsort()),
        lambda x, order: x.gather(0, order.argsort()[:, None].expand_as(x)),
    ),
    "flip": (lambda x, key: (x.flip(0), None), lambda x, _: torch.flip(x, [0])),
    "roll": (lambda x, key: (x.roll(1, 0), None), lambda x, _: torch.roll(x, -1, dims=0)),
    "flip by keywords": (
        lambda x, key: (torch.flip(input=x, dims=(0,)), None),
        lambda x, _: torch.flip(dims=[0], input=x),
    ),
    "index_select by keywords": (
        lambda x, key: (torch.index_select(input=x, dim=0, index=key.argsort()), key.argsort()),
        lambda x, order: torch.index_select(index=order.argsort(), dim=0, input=x),
    ),
    "random": (
        lambda x, key: (lambda order: (x[order], order))(torch.randperm(x.shape[0])),
        lambda x, order: x[order.argsort(), :],
    ),
    "beside zeros": (
        lambda x, key: (x[key.argsort()] + x.new_zeros(x.shape[0], 6), key.argsort()),
        lambda x, order: x[order.argsort()],
    ),
    "folded": (
        lambda x, key: (x[key.argsort()].view(-1, 3, 2).flatten(0, 1).view(-1, 6), key.argsort()),
        lambda x, order: x[order.argsort()],
    ),
}

X, KEY = torch.linspace(-2, 2, 48).sin().view(8, 6), torch.tensor([5, 3, 7, 1, 2, 6, 0, 4])


@pytest.mark.parametrize("change", CHANGES)
def test_no_cut_lies_where_samples_are_in_another_order(change):
    torch.manual_seed(0)
    model = Reorders(*CHANGES[change])
    net = sffx.transform(model, "layer", (X, KEY), norm="none", check=False).eval()
    assert net.plan.blocks[0].modules == ("first",)
    found = net.train()(X, KEY)
    assert torch.allclose(found[-1], model(X, KEY))
    order = torch.tensor([1, 2, 0, 3, 5, 7, 4, 6])
    assert torch.allclose(net(X[order], KEY[order]), found[:, order], atol=1e-6)


# These leave the order, or mix samples with others beside their own.
KEEPS = {
    "count": lambda x, key: x[torch.arange(x.shape[0])],
    "position": lambda x, key: x[:, key.new_zeros(6)],
    "flip of features": lambda x, key: x.flip(1),
    "roll of features": lambda x, key: x.roll(2, -1),
    "sort of features": lambda x, key: x.sort(-1)[0],
    "mixture": lambda x, key: 0.9 * x + 0.1 * x[torch.randperm(x.shape[0])],
}


@pytest.mark.parametrize("keep", KEEPS)
def test_cuts_lie_where_samples_keep_their_order(keep):
    function = KEEPS[keep]
    model = Reorders(lambda x, key: (function(x, key), None), lambda x, _: x)
    assert len(sffx.plan(model, "layer", (X, KEY))) == 4


def test_an_output_in_another_order_is_refused():
    model = Reorders(_sorted, lambda x, _: x)
    with pytest.raises(TraceError, match=r"another order than those of its inputs.*argsort"):
        sffx.plan(model, "layer", (X, KEY))


def test_the_reason_is_told_for_a_cut_that_is_asked_for():
    with pytest.raises(sffx.CutError, match="its samples lie in another order"):
        sffx.plan(Reorders(*CHANGES["index"]), ["relu_1"], (X, KEY))


def test_no_sample_leaves_an_order_of_samples():
    net = sffx.transform(Reorders(*CHANGES["index"]), "layer", (X, KEY))
    assert sffx.EarlyExit(net, 0.9)((X, KEY)).scores.shape == (8, 4)

    class Later(Reorders):
        """Reads the order behind a cut that comes after it."""

        def forward(self, x: Tensor, key: Tensor) -> Tensor:
            order = key.argsort()
            x = self.last(self.first(x)[order][order.argsort()].relu())
            return self.head(self.a(x).relu()[order][order.argsort()])

    net = sffx.transform(Later(None, None), "layer", (X, KEY))
    with pytest.raises(InputError, match=r"'argsort\w*' crosses a cut .*another order"):
        sffx.EarlyExit(net, 0.9)
