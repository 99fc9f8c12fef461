from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from tests.compiler.trace.oracle import (
    Applies,
    assert_same_logits,
    cut_without_norms,
    leaf_names,
)
from tests.toys import DataBranch, around


def _without_gradient(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.inner(x)


def _in_bfloat16(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.inner(x).float()


def test_a_region_that_a_graph_cannot_hold_makes_a_leaf():
    model = around(Applies(_in_bfloat16))
    net = cut_without_norms(model).train()
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model)


def test_a_layer_in_a_region_without_gradients_does_not_learn_there():
    model = around(Applies(lambda m, x: x + _without_gradient(m, x)))
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not leaf_names(net)
    assert sffx.check(model, net, torch.randn(5, 6), raises=False).difference is None


def _written_in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 2
    with torch.no_grad():
        x.add_(1)
    return x


def test_a_write_without_gradient_on_a_value_with_one_makes_a_leaf():
    net = cut_without_norms(around(Applies(_written_in_place)))
    assert leaf_names(net) == ["2"]


class _WithoutGradients(nn.Module):
    """Computes `code` in a region without gradients, in its own forward."""

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.frozen, self.code = nn.Linear(8, 8).requires_grad_(False), code
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).sigmoid()
        with torch.no_grad():
            z = self.code(self, y)
        return self.head(self.b(y * 2 + z).sigmoid())


def _averaged(m: Any, y: Tensor) -> Tensor:
    m.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
    return m.average.clone()


def _copied(m: Any, y: Tensor) -> Tensor:
    m.average.copy_(y[0])
    return y - m.average


def _clamped(m: Any, y: Tensor) -> Tensor:
    m.b.weight.clamp_(-0.1, 0.1)
    return y.softmax(-1)


def _normalised(m: Any, y: Tensor) -> Tensor:
    return y @ torch.nn.functional.normalize(m.b.weight, dim=1)


def _through_a_frozen_layer(m: Any, y: Tensor) -> Tensor:
    return m.frozen(y).relu()


def _by_a_decorated_function(m: Any, y: Tensor) -> Tensor:
    return torch.no_grad()(lambda: torch.arange(8.0) * y.norm())()


def _as_a_teacher(m: Any, y: Tensor) -> Tensor:
    for teacher, student in zip(m.frozen.parameters(), m.b.parameters(), strict=True):
        teacher.data.mul_(0.9).add_(student.data, alpha=0.1)
    return torch.nn.functional.linear(y, m.frozen.weight, m.frozen.bias)


@pytest.mark.parametrize(
    "code",
    [
        _as_a_teacher,
        _averaged,
        _copied,
        _clamped,
        _normalised,
        _through_a_frozen_layer,
        _by_a_decorated_function,
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_region_without_gradients_is_part_of_the_graph(code, grad):
    """Whether the caller has gradients when it cuts or not."""
    model = _WithoutGradients(code)
    with torch.set_grad_enabled(grad):
        net = sffx.transform(model, "layer", norm="none", check=False)
    assert not net.plan.leaves
    report = sffx.check(model, net)
    assert report.errors["gradients, train mode, 4 samples"] < 1e-4
    x = torch.randn(5, 6)
    for _ in range(2):
        found, expected = net.train()(x)[-1], model.train()(x)
        assert torch.allclose(found, expected, atol=1e-6)
    assert not any(buffer.requires_grad for buffer in net.buffers())
    assert torch.allclose(sffx.extract(net).average, model.average, atol=1e-6)


def _written(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.clamp_(-0.1, 0.1)
    return torch.nn.functional.linear(x, m.inner.weight)


def _written_beside(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for parameter in m.parameters():
            parameter.clamp_(-0.1, 0.1)
    return torch.nn.functional.linear(x, m.inner.weight)


@pytest.mark.parametrize(("code", "leaves"), [(_written, []), (_written_beside, ["2"])])
def test_a_write_on_parameters_is_traced_or_makes_a_leaf(code, leaves):
    model = around(Applies(code))
    net = cut_without_norms(copy.deepcopy(model)).train()
    assert leaf_names(net) == leaves
    assert_same_logits(net, model)
    assert torch.equal(sffx.extract(net)[2].inner.weight, model[2].inner.weight)


def _assigned(m: nn.Module, x: Tensor) -> Tensor:
    for parameter in m.parameters():
        parameter.data = parameter.data.clamp(-0.1, 0.1)
    return torch.nn.functional.linear(x, m.inner.weight, m.inner.bias)


def _assigned_before_a_call(m: nn.Module, x: Tensor) -> Tensor:
    m.inner.weight.data = torch.renorm(m.inner.weight.data, 2, 0, 0.1)
    return m.inner(x) + x


class AppliesFirst(nn.Module):
    """Applies `code` to its layer, which has not run before."""

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.inner, self.code = nn.Linear(6, 6), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def _assigned_by_the_input(m: nn.Module, x: Tensor) -> Tensor:
    m.inner.bias.data = 0.5 * m.inner.bias.data + x.detach().mean(0)
    return m.inner(x)


@pytest.mark.parametrize("code", [_assigned, _assigned_before_a_call, _assigned_by_the_input])
def test_the_data_of_a_parameter_is_assigned_in_the_block_that_reads_it(code):
    layers = [AppliesFirst(code), nn.ReLU(), AppliesFirst(code), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(6, 4))
    net = cut_without_norms(copy.deepcopy(model)).train()
    assert not leaf_names(net)
    assert [block.num_parameters for block in net.plan] == [42, 42]
    assert_same_logits(net, model)
    assert torch.equal(sffx.extract(net)[2].inner.weight, model[2].inner.weight)
    assert torch.equal(sffx.extract(net)[2].inner.bias, model[2].inner.bias)


def _assigned_to_a_value(m: nn.Module, x: Tensor) -> Tensor:
    """A view of the value keeps its numbers."""
    y = m.inner(x)
    view = y[:, :3]
    y.data = torch.zeros_like(y)
    return torch.cat([y[:, :3], view], 1)


def _assigned_after_a_use(m: nn.Module, x: Tensor) -> Tensor:
    """Autograd keeps the weights of the first call."""
    y = m.inner(x)
    m.inner.weight.data = 0.5 * m.inner.weight.data
    return m.inner(y)


@pytest.mark.parametrize("code", [_assigned_to_a_value, _assigned_after_a_use])
def test_data_is_assigned_in_a_leaf_where_the_old_numbers_are_kept(code):
    model = around(AppliesFirst(code))
    net = cut_without_norms(copy.deepcopy(model)).train()
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model)


def test_the_data_of_a_value_is_read_as_its_detached_value():
    def code(m: nn.Module, x: Tensor) -> Tensor:
        y = m.inner(x)
        batch, width = y.data.size()
        return y.view(batch, 2, width // 2).flatten(1) - y.data.mean(1, keepdim=True)

    model = nn.Sequential(nn.Linear(6, 6), Applies(code), nn.Linear(6, 3))
    net = cut_without_norms(model)
    assert not leaf_names(net)
    assert_same_logits(net, model)


def test_a_module_that_a_forward_makes_is_part_of_its_code():
    model = around(Applies(lambda m, x: nn.ReLU()(x)))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)


@dataclass
class _Record:
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: object = None


class _Decorated(nn.Module):
    """A forward behind a decorator, with arguments that only `**kwargs` takes.

    It returns a record with a thing that no graph can hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(
        self, x: Tensor, scale: float = 1.0, *, bias: Tensor | None = None, **kwargs: Tensor
    ) -> _Record:
        x = F.relu(self.inner(x)) * scale + (0 if bias is None else bias) + kwargs.get("shift", 0)
        return _Record(logits=self.head(x), cache=object())

    plain_forward = forward

    @functools.wraps(plain_forward)
    def forward(self, *args: Any, **kwargs: Any) -> _Record:
        return self.plain_forward(*args, **kwargs)


def test_a_decorated_forward_takes_its_arguments_by_name_and_returns_a_record():
    model = _Decorated()
    inputs = {name: torch.randn(5, 6) for name in ("x", "bias", "shift")}
    net = cut_without_norms(model, example={**inputs, "scale": 2.0}).eval()
    assert [i.name for i in net.plan.inputs] == ["x", "bias", "shift"]
    assert torch.equal(net(**inputs), model(**inputs, scale=2.0).logits)


class _NoMask(nn.Module):
    """A leaf that returns a value and, as its second output, no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DataBranch()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (self.inner.inner(x) if x.sum() > 0 else self.inner(x)), None


class _ReadsMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = _NoMask(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x)
        x = F.relu(x)
        return self.head(x if mask is None else x.masked_fill(mask, 0.0))


def test_none_among_the_outputs_of_a_leaf_is_none():
    traced = trace(_ReadsMask())
    assert [leaf.qualname for leaf in traced.leaves] == ["embed"]
    assert "masked_fill" not in {node.target for node in traced.graph.nodes}


def test_a_forward_goes_through_the_rows_of_a_parameter():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(3, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            for row in self.rows:
                x = torch.relu(x @ row)
            return x * len(self.rows)

    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Rows(), nn.ReLU()), nn.Linear(6, 3)).eval()
    net = cut_without_norms(model)
    assert_same_logits(net, model)


def test_an_operation_that_fails_in_a_try_is_no_part_of_the_graph():
    def code(module: nn.Module, x: Tensor) -> Tensor:
        try:
            return x @ x.new_ones(5, 5)
        except RuntimeError:
            return x * 2

    model = around(Applies(code)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)


class _DynamicCache:
    """Keys and values of earlier tokens, as in transformers."""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (_DynamicCache(), "passes on an object of the class _DynamicCache, .*; use_cache=False"),
        (object(), "passes on an object of the class object, which a graph cannot hold"),
        (nn.Parameter(torch.ones(6)), "uses a parameter that the model does not own"),
    ],
)
def test_what_a_graph_cannot_hand_to_a_leaf_is_named(value, reason):
    class Takes(nn.Linear):
        def forward(self, x: Tensor, given: Any) -> Tensor:
            return super().forward(x)

    model = type("Root", (nn.Module,), {"forward": lambda m, x: m.last(m.takes(x, value))})()
    model.takes, model.last = Takes(6, 6), nn.Linear(6, 3)
    with pytest.raises(TraceError, match=reason):
        sffx.plan(model, "layer", torch.zeros(2, 6))
