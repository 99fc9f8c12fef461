"""What a forward keeps outside of a call: in caches, lists, buffers that it registers, slots."""

from __future__ import annotations

import functools
import itertools
import types
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError, TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms, leaf_names

CACHE: dict[Any, Any] = {}
ROWS: list[Any] = []


@functools.lru_cache
def _table(size: int) -> Tensor:
    return torch.arange(float(size))


class _Keeps(nn.Module):
    """A layer, and code that keeps something."""

    calls = 0

    def __init__(self, code) -> None:
        super().__init__()
        self.linear, self.code = nn.Linear(6, 6), code
        self.register_buffer("steps", torch.zeros(()))
        self.seen: Any = []
        self.recent = deque(maxlen=2)
        self.state = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.linear(x))


class _Net(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.first, self.keeps, self.head = nn.Linear(6, 6), _Keeps(code), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.keeps(self.first(x).relu()).relu())


def _in_a_dictionary(m: _Keeps, x: Tensor) -> Tensor:
    if "table" not in CACHE:
        CACHE["table"] = torch.arange(6.0)
    return x * CACHE["table"]


def _of_weights_in_a_dictionary(m: _Keeps, x: Tensor) -> Tensor:
    if "weights" not in CACHE:
        CACHE["weights"] = m.linear.weight.detach().sum(1)
    return x * CACHE["weights"]


def _of_inputs_in_a_list(m: _Keeps, x: Tensor) -> Tensor:
    ROWS.append(x.detach())
    return x


def _by_a_cached_function(m: _Keeps, x: Tensor) -> Tensor:
    return x * _table(6)


def _in_a_registered_buffer(m: _Keeps, x: Tensor) -> Tensor:
    if not hasattr(m, "table"):
        m.register_buffer("table", torch.arange(6.0), persistent=False)
    return x * m.table


def _in_a_counting_buffer(m: _Keeps, x: Tensor) -> Tensor:
    m.steps += 1
    return x / m.steps


@pytest.mark.parametrize(
    "code",
    [_in_a_dictionary, _by_a_cached_function, _in_a_registered_buffer, _in_a_counting_buffer],
)
def test_what_can_be_kept_makes_no_leaf(code):
    CACHE.clear()
    _table.cache_clear()
    model = _Net(code)
    net = cut_without_norms(model)
    assert leaf_names(net) == []
    assert sffx.check(model, net).passed
    sffx.footprint(net, 4)
    for _ in range(2):
        assert_same_logits(net.eval(), model.eval(), torch.randn(3, 6))
    assert sffx.extract(net).state_dict().keys() == _Net(code).state_dict().keys()


@pytest.mark.parametrize(
    "code", [_in_a_dictionary, _of_weights_in_a_dictionary, _of_inputs_in_a_list]
)
@pytest.mark.parametrize("is_leaf", [False, True])
def test_no_cache_of_the_users_code_gets_a_fake_tensor(code, is_leaf):
    CACHE.clear()
    ROWS.clear()
    _table.cache_clear()

    def in_a_leaf(m: _Keeps, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # such a region makes a leaf
            _table(6)
            x = x * 1.0
        return code(m, x)

    net = sffx.transform(_Net(in_a_leaf if is_leaf else code), "layer", check=False)
    sffx.footprint(net, 4)
    for value in (*CACHE.values(), *ROWS, _table(6)):
        assert type(value) is Tensor


def _appends(m: _Keeps, x: Tensor) -> Tensor:
    m.seen.append(1.0)
    return x * len(m.seen)


def _remembers(m: _Keeps, x: Tensor) -> Tensor:
    m.recent.append(x.detach().mean(0))
    return x + sum(m.recent)


def _writes_an_attribute(m: _Keeps, x: Tensor) -> Tensor:
    m.state += 1
    return x + m.state


def _writes_a_registered_buffer(m: _Keeps, x: Tensor) -> Tensor:
    if not hasattr(m, "table"):
        m.register_buffer("table", torch.zeros(6))
    m.table.add_(1)
    return x + m.table


def _averages(m: _Keeps, x: Tensor) -> Tensor:
    m.state = 0.9 * m.state + 0.1 * x.detach().mean(0)
    return x + m.state


def _averages_in_a_dictionary(m: _Keeps, x: Tensor) -> Tensor:
    m.seen = {"mean": (m.seen["mean"] if m.seen else 0) + x.detach().mean(0)}
    return x + m.seen["mean"]


def _reads_the_last_output(m: _Keeps, x: Tensor) -> Tensor:
    last = getattr(m, "last", None)
    m.last = x.detach()
    return x if last is None else x + last.mean(0)


def _counts_in_a_dictionary(m: _Keeps, x: Tensor) -> Tensor:
    m.seen = m.seen or {"calls": 0}
    m.seen["calls"] += 1
    return x * m.seen["calls"]


def _counts_in_an_object(m: _Keeps, x: Tensor) -> Tensor:
    m.seen = m.seen or types.SimpleNamespace(calls=0)
    m.seen.calls += 1
    return x * m.seen.calls


def _counts_in_the_class(m: _Keeps, x: Tensor) -> Tensor:
    type(m).calls += 1
    return x * (1 + type(m).calls % 2)


def _iterates(m: _Keeps, x: Tensor) -> Tensor:
    m.seen = m.seen or itertools.count(1)
    return x * next(m.seen)


CHANGES = [
    _appends,
    _remembers,
    _writes_an_attribute,
    _writes_a_registered_buffer,
    _averages,
    _averages_in_a_dictionary,
    _reads_the_last_output,
    _counts_in_a_dictionary,
    _counts_in_an_object,
    _counts_in_the_class,
    _iterates,
]


@pytest.mark.parametrize("code", CHANGES)
def test_what_each_call_changes_makes_a_leaf(code):
    model = _Net(code)
    net = sffx.transform(model, "layer", norm="none", check=code is not _counts_in_the_class)
    assert leaf_names(net) == ["keeps"]
    with pytest.raises(TraceError, match="at each call"):
        sffx.plan(_Keeps(code), example_input=torch.zeros(1, 6))


def test_a_tensor_that_a_first_call_computes_of_weights_is_noted():
    def keeps(m: _Keeps, x: Tensor) -> Tensor:
        if not hasattr(m, "scale"):
            m.scale = m.linear.weight.detach().sum(1)
        return x * m.scale

    def computes(m: _Keeps, x: Tensor) -> Tensor:
        m.scale = m.linear.weight.detach().sum(1)
        return x * m.scale

    (note,) = [n for n in sffx.plan(_Net(keeps)).notes if "first call" in n]
    assert note.startswith("the model computes keeps.scale in its first call and keeps it")
    assert not [n for n in sffx.plan(_Net(computes)).notes if "first call" in n]


def test_item_assignment_of_a_path_on_a_made_tensor_is_a_path():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu()).relu()
            y = torch.zeros(x.shape[0], 8)
            y[:, :4] = x[:, :4] * 2
            y[:, 4:] = 1
            return self.head(self.c(y).relu())

    model = Net()
    net = cut_without_norms(model)
    assert len(net.plan) == 3
    assert sffx.check(model, net).passed
    loss = sffx.local_loss(net.train(), torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


class _Slotted(_Net):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__(_in_a_dictionary)
        self.factor = 2.0


class _SlottedByText(_Net):
    __slots__ = "factor"

    def __init__(self) -> None:
        super().__init__(_in_a_dictionary)
        self.factor = 2.0


def test_what_a_copy_would_lose_or_share_is_refused_by_name():
    with pytest.raises(InputError, match="_Slotted keeps 'factor' in a slot"):
        sffx.plan(_Slotted())
    with pytest.raises(InputError, match="_SlottedByText keeps 'factor' in a slot"):
        sffx.plan(_SlottedByText())
    model = _Net(_in_a_dictionary)
    model.first = torch.compile(model.first, backend="eager")
    with pytest.raises(InputError, match="'first' is compiled"):
        sffx.plan(model)
