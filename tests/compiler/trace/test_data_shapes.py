"""Shapes that depend on data, in the forward of the model itself, are traced with guards."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError

END = 2


class _ReadsEnds(nn.Module):
    """Classifies the state at the last end-of-sentence token, as Bart does."""

    def __init__(self, checks, is_sliced: bool = True) -> None:
        super().__init__()
        self.checks, self.is_sliced = checks, is_sliced
        self.embed, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.a(x).relu()
        x = x + self.b(x).relu()
        mask = ids.eq(END)
        self.checks(mask)
        ends = x[mask, :] if self.is_sliced else x[mask]
        torch._check_with(ValueError, ends.shape[0] // x.shape[0] >= 1, lambda: "no end")
        return self.head(ends.view(x.size(0), -1, x.size(-1))[:, -1, :])


def _by_check(mask: Tensor) -> None:
    is_same = torch.unique_consecutive(mask.sum(1)).numel() == 1
    torch._check_with(ValueError, is_same, lambda: "ends differ")


def _by_branch(mask: Tensor) -> None:
    if len(torch.unique_consecutive(mask.sum(1)).shape) != 1:
        raise ValueError
    if torch.unique_consecutive(mask.sum(1)).numel() > 1:
        raise ValueError("ends differ")


@pytest.mark.parametrize("checks", [_by_check, _by_branch])
@pytest.mark.parametrize("num_ends", [1, 2])
def test_the_state_at_the_end_of_sentence_is_classified(checks, num_ends):
    torch.manual_seed(0)
    model = _ReadsEnds(checks, is_sliced=num_ends == 1)
    ids = torch.randint(3, 9, (5, 6))
    ids[:, -num_ends:] = END
    ids[0] = ids[0].flip(0)
    net = sffx.transform(model, policy="layer", example_input=ids[:2], norm="none")
    assert not net.plan.leaves
    assert len(net.plan) >= 2
    for training in (True, False):
        expected = model.train(training)(ids)
        net.train(training)
        scores = net(ids)[-1] if training else _logits(net, ids)
        torch.testing.assert_close(scores, expected)
    sffx.local_loss(net.train(), ids, torch.arange(5) % 4).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert sffx.extract(net).eval()(ids).shape == (5, 4)


def _logits(net, ids: Tensor) -> Tensor:
    net.readout.mode = "classifier"
    return net(ids)


@pytest.mark.parametrize("row", [[3, 4, 5, 6, 7, 8], [END, 4, 5, 6, 7, END]])
def test_what_the_model_refuses_the_net_refuses(row):
    model = _ReadsEnds(_by_check)
    ids = torch.full((4, 6), END)
    ids[:, :-1] = 3
    net = sffx.transform(model, policy="layer", example_input=ids).eval()
    ids[1] = torch.tensor(row)
    with pytest.raises(ValueError, match="end"):
        model.eval()(ids)
    for each in (net, pickle.loads(pickle.dumps(net))):
        with pytest.raises(InputError, match="checks its input"):
            each(ids)


class _Selects(nn.Module):
    """Reads a number off a shape that depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x[x > 0])


def test_a_number_from_such_a_shape_makes_a_leaf():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(_Selects()), nn.Linear(6, 4))
    net = sffx.transform(model, policy="layer", example_input=torch.zeros(2, 6), norm="none")
    x = torch.randn(3, 6)
    torch.testing.assert_close(net.train()(x)[-1], model.train()(x))


def test_such_a_model_is_compared_on_its_example():
    model = _ReadsEnds(_by_check)
    ids = torch.full((3, 6), END)
    ids[:, :-1] = torch.randint(3, 9, (3, 5))
    net = sffx.transform(model, policy="layer", example_input=ids)
    with pytest.raises(InputError, match="pass an example_input"):
        sffx.check(model, net)
    report = sffx.check(model, net, ids)
    assert report.passed
    assert "train mode, 4 samples" in report.errors
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert not sffx.check(model, net, ids, raises=False).passed
