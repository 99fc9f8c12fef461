"""Forwards that need gradients to run: they compute some, or hang a hook on a value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import VerifyError
from tests.compiler.trace.oracle import leaf_names


class _Reverses(nn.Module):
    """Turns the gradient of its value round, as for a domain classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.training:
            x.register_hook(torch.neg)
        return x


class _Descends(nn.Module):
    """Takes a step down the gradient of an energy."""

    asks = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and not x.requires_grad:
            x = x.detach().requires_grad_()
        energy = self.inner(x).square().sum()
        (gradient,) = torch.autograd.grad(energy, x, create_graph=True)
        return x - gradient


class _DescendsOnly(_Descends):
    asks = False


def _around(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    ends = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(*ends[0], layer, *ends[1])


@pytest.mark.parametrize("kind", [_Reverses, _Descends])
def test_a_forward_may_need_gradients(kind):
    model = _around(kind())
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    net = sffx.transform(model, "layer", x, norm="none", check=True)
    assert leaf_names(net) == ["2"]
    net(x)[-1].logsumexp(1).sum().backward()
    model(x).logsumexp(1).sum().backward()
    for found, expected in zip(net.classifier.parameters(), model[4].parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    sffx.local_loss(net, x, y).backward()


def test_gradients_of_a_value_behind_a_cut_are_explained():
    with pytest.raises(VerifyError, match=r"behind a cut carries no gradient\. Hint: a forward"):
        sffx.transform(_around(_DescendsOnly()), "layer", torch.randn(5, 6))
