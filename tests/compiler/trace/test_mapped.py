"""Calls of torch.vmap in the forward of the model itself."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func, nn

import sffx


class _Maps(nn.Module):
    """A row of layers, with a mapped function between."""

    def __init__(self, code) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second = nn.Linear(8, 8)
        self.scale, self.factor = nn.Parameter(torch.randn(8)), 3.0
        self.members = nn.Parameter(torch.randn(3, 8, 8))
        self.register_buffer("shift", torch.randn(8))
        self.norm = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.code = code

    def part(self, row: Tensor) -> Tensor:
        return self.layer(row) * self.scale * self.factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.code(self, self.first(x).relu())
        return self.last(self.second(x).relu())


def _holding_a_traced_value(m: _Maps, x: Tensor) -> Tensor:
    mean, size = x.mean(0), x.shape[1]
    return torch.vmap(lambda row: (row - mean) / size)(x)


def _with_a_default(m: _Maps, x: Tensor) -> Tensor:
    def scaled(row: Tensor, by: Tensor = m.scale, *, shift: Tensor = m.shift) -> Tensor:
        return row * by + shift

    return torch.vmap(scaled)(x)


def _of_vjp(m: _Maps, x: Tensor) -> Tensor:
    y, pull_back, squares = func.vjp(lambda h, w: (m.layer(h) * w, h**2), x, m.scale, has_aux=True)
    of_x, of_scale = pull_back(y)
    return y + of_x * of_scale + squares


_CODES = {
    "function of torch": lambda m, x: torch.vmap(torch.softmax, (0, None))(x, 0),
    "pairs": lambda m, x: x * torch.vmap(torch.dot)(x, x)[:, None],
    "layer": lambda m, x: torch.vmap(m.layer)(x),
    "method": lambda m, x: torch.vmap(m.part)(x),
    "parameter and buffer": lambda m, x: torch.vmap(lambda row: row * m.scale + m.shift)(x),
    "traced value": _holding_a_traced_value,
    "defaults": _with_a_default,
    "partial": lambda m, x: torch.vmap(functools.partial(torch.mul, m.scale))(x),
    "another axis": lambda m, x: torch.vmap(lambda column: column - column.mean(), 1, 1)(x),
    "ensemble": lambda m, x: torch.vmap(lambda weight: x @ weight)(m.members).mean(0),
    "mode": lambda m, x: torch.vmap(lambda row: row * (2 if m.training else 3))(x),
    "dropout": lambda m, x: torch.vmap(
        lambda row: F.dropout(row, 0.5, m.training), randomness="different"
    )(x),
    "stacked layers": lambda m, x: torch.vmap(
        lambda tensors: func.functional_call(m.layer, tensors, (x,))
    )({"weight": m.members, "bias": m.scale * m.members[:, 0]}).mean(0),
    "row of layers": lambda m, x: torch.vmap(m.norm, randomness="different")(x),
    "grad": lambda m, x: x - func.grad(lambda h: (m.layer(h) * m.scale).square().sum())(x),
    "grad of a method": lambda m, x: x - func.grad(lambda h: m.part(h).square().sum())(x),
    "grad and value": lambda m, x: x * func.grad_and_value(lambda h: h.sin().sum())(x)[0],
    "grad of each sample": lambda m, x: torch.vmap(func.grad(lambda row: (row * x[0]).sum()))(x),
    "vjp": lambda m, x: x + func.vjp(lambda h: m.layer(h).tanh(), x)[1](x)[0],
    "vjp, both": _of_vjp,
    "jvp": lambda m, x: sum(func.jvp(lambda h: m.layer(h).tanh(), (x,), (x * 2,))),
    "jacobian": lambda m, x: torch.vmap(func.jacrev(m.part))(x).sum(1),
    "jacobian of all": lambda m, x: x + func.jacrev(lambda h: m.part(h).sum(0))(x).sum((0, 1)),
    "jacobian, forward": lambda m, x: torch.vmap(func.jacfwd(m.part))(x).sum(1),
    "hessian": lambda m, x: torch.vmap(func.hessian(lambda row: m.part(row).sin().sum()))(x).sum(1),
}


class _Submodule(_Maps):
    """The same code in the forward of a submodule."""

    class Inner(nn.Module):
        def __init__(self, maps: _Maps) -> None:
            super().__init__()
            self.layer, self.norm, self.scale = maps.layer, maps.norm, maps.scale
            self.members, self.factor, self.code = maps.members, maps.factor, maps.code
            self.register_buffer("shift", maps.shift)

        part = _Maps.part

        def forward(self, x: Tensor) -> Tensor:
            return self.code(self, x)

    def __init__(self, code) -> None:
        super().__init__(code)
        self.inner = self.Inner(self)
        self.code = lambda m, x: m.inner(x)


_DIFFERENTIATED = list(_CODES)[list(_CODES).index("grad") :]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("code", _DIFFERENTIATED)
def test_a_function_that_a_submodule_differentiates_runs_as_in_the_model(code):
    model = _Submodule(_CODES[code])
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not net.plan.leaves
    assert sffx.check(model, net, torch.randn(5, 6)).difference is None


@pytest.mark.sampled(9)
@pytest.mark.parametrize("code", _CODES.values(), ids=_CODES)
def test_a_mapped_function_runs_as_in_the_model(code):
    model = _Maps(code)
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not net.plan.leaves
    assert len(net.plan) >= 2
    assert sffx.check(model, net, torch.randn(5, 6)).difference is None
    assert sffx.check(model, copy.deepcopy(net), torch.randn(5, 6)).difference is None


def test_a_net_with_a_mapped_method_is_pickled():
    net = sffx.transform(_Maps(_by_method), "layer", torch.zeros(2, 6)).eval()
    x = torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def _by_method(m: _Maps, x: Tensor) -> Tensor:
    return torch.vmap(m.part)(x)
