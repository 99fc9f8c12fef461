"""Layers that a forward calls with other tensors or attributes than those that they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import sffx
from sffx.errors import TraceError


class _Calls(nn.Module):
    """A row of layers, with other code between."""

    def __init__(self, code) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.code = code
        self.layer, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.other_norm = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.row = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.drop = nn.Dropout(0.5)
        self.weights = nn.Linear(8, 64)
        self.bare = nn.Linear(8, 8)
        del self.bare.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.code(self, self.first(x).relu()).relu())


def _generated(m: _Calls, x: Tensor) -> Tensor:
    return m.weights(x.mean(0)).view(8, 8)


def _tensors(m: nn.Module) -> dict[str, Tensor]:
    return {**dict(m.named_parameters()), **dict(m.named_buffers())}


def _shrunk(m: nn.Module, of: str = "parameters") -> dict[str, Tensor]:
    held = dict(m.named_parameters()) if of == "parameters" else m.state_dict()
    return {name: 0.9 * value for name, value in held.items() if value.is_floating_point()}


def _after_a_step(m: _Calls, x: Tensor) -> Tensor:
    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return functional_call(m.layer, tensors, (x,)).square().mean()

    tensors = dict(m.layer.named_parameters())
    steps = grad(loss)(tensors)
    moved = {name: value - 0.1 * steps[name] for name, value in tensors.items()}
    return functional_call(m.layer, moved, (x,))


def _assigned(m: _Calls, x: Tensor) -> Tensor:
    m.bare.weight = _generated(m, x)
    return m.bare(x)


def _assigned_twice(m: _Calls, x: Tensor) -> Tensor:
    x = _assigned(m, x)
    m.bare.weight = m.layer.weight * 2
    return m.bare(x)


def _other_rate(m: _Calls, x: Tensor) -> Tensor:
    m.drop.p = 0.25
    return m.drop(x)


def _rate_by_mode(m: _Calls, x: Tensor) -> Tensor:
    m.drop.p = 0.25 if m.training else 0.75
    return m.drop(x)


_CODES = {
    "own": lambda m, x: functional_call(m.layer, _tensors(m.layer), (x,)),
    "of another": lambda m, x: functional_call(m.layer, _tensors(m.other), (x,)),
    "of an earlier one": lambda m, x: functional_call(m.other, _tensors(m.layer), (x,)),
    "scaled": lambda m, x: functional_call(m.layer, {"weight": m.layer.weight * 2}, (x,)),
    "generated": lambda m, x: functional_call(m.layer, {"weight": _generated(m, x)}, (x,)),
    "of another norm": lambda m, x: functional_call(m.norm, _tensors(m.other_norm), (x,)),
    "in a row": lambda m, x: functional_call(m.row, {"0.weight": m.layer.weight}, (x,)),
    "both ways": lambda m, x: m.layer(functional_call(m.layer, {"bias": m.other.bias}, (x,))),
    "shrunk": lambda m, x: functional_call(m.layer, _shrunk(m.layer), (x,)),
    "shrunk, of the state": lambda m, x: functional_call(m.norm, _shrunk(m.norm, "state"), (x,)),
    "transposed": lambda m, x: x @ next(iter(m.layer.parameters())).T,
    "divided by the norms": lambda m, x: x / sum(p.norm() for p in m.layer.parameters()),
    "after a step": _after_a_step,
    "assigned": _assigned,
    "assigned twice": _assigned_twice,
    "rate": _other_rate,
    "rate by mode": _rate_by_mode,
}


@pytest.mark.parametrize("code", _CODES.values(), ids=_CODES)
def test_a_layer_computes_with_what_it_is_given(code):
    model = _Calls(code)
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not net.plan.leaves
    assert sffx.check(model, net, torch.randn(5, 6)).difference is None


def test_a_forward_that_assigns_a_parameter_is_refused():
    def tie(m: _Calls, x: Tensor) -> Tensor:
        m.layer.weight = m.other.weight
        return m.layer(x)

    with pytest.raises(TraceError, match=r"parameter 'layer\.weight'.*Hint: .*functional_call"):
        sffx.plan(_Calls(tie), "layer", torch.zeros(2, 6))


def test_an_attribute_that_is_set_to_what_it_is_changes_nothing():
    def set_again(m: _Calls, x: Tensor) -> Tensor:
        m.norm.sizes, m.drop.p = [2, 2], 0.5
        return m.drop(m.norm(x))

    model = _Calls(set_again)
    model.norm.sizes = [2, 2]
    net = sffx.transform(model, "batchnorm", torch.zeros(2, 6))
    assert {"block_0.norm", "block_0.drop"} <= dict(net.named_modules()).keys()


def test_an_attribute_for_those_who_look_at_the_model_changes_nothing():
    def note(m: _Calls, x: Tensor) -> Tensor:
        m.norm.latest = x
        return m.norm(x)

    net = sffx.transform(_Calls(note), "batchnorm", torch.zeros(2, 6))
    assert "block_0.norm" in dict(net.named_modules())
