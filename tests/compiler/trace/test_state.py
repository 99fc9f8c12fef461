"""State that a forward makes or changes is the model's, call by call, and not the trace's."""

from __future__ import annotations

import array
import copy
import functools
import math
import random
import types
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError
from tests.compiler.trace.oracle import Applies, assert_same_logits, cut_without_norms, leaf_names
from tests.toys import around


class _Tables(nn.Module):
    """Adds a table of positions, which the first forward makes and keeps."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.way, self.table, self.tables = way, None, {}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) + self.positions(x.shape[1])).relu().mean(1))

    def positions(self, n: int) -> Tensor:
        if self.way == "attribute":
            self.table = _sines(n) if self.table is None else self.table
            return self.table
        if self.way == "new attribute":
            if not hasattr(self, "fresh"):
                self.fresh = _sines(n)
            return self.fresh
        if self.way == "cache":
            return _cached(8)
        return self.tables.setdefault(int(n), _sines(n))


def _sines(n: int) -> Tensor:
    return torch.arange(float(n)).sin()[:, None]


@functools.lru_cache
def _cached(n: int) -> Tensor:
    return torch.linspace(-1, 1, n)


@pytest.mark.parametrize("way", ["attribute", "new attribute", "dictionary", "cache"])
def test_a_table_that_the_first_forward_makes(way):
    _cached.cache_clear()
    model = _Tables(way).eval()
    x = torch.randn(3, 7, 6)
    net = cut_without_norms(model, example=x[:1])
    assert not net.plan.leaves
    assert type(_cached(8)) is Tensor
    assert model.table is None
    assert not model.tables
    assert_same_logits(net, model, x, x[:2])
    assert_same_logits(sffx.extract(net), model, x)


def _accumulated(m: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros(6)
    total += x.mean(0)
    return x + total


def _read_after_the_write(m: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros(6)
    total.add_(x.mean(0))
    return x + total * 2 + torch.stack([total, total]).sum(0)


def _filled(m: nn.Module, x: Tensor) -> Tensor:
    mask = torch.ones(6)
    mask[2:4] = x.mean()
    mask[0] = 3.0
    return x * mask + mask.sum()


def _written_between_two_uses(m: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros(6)
    x = x + table
    table += 1
    return x * 3 + table


@pytest.mark.parametrize(
    "code", [_accumulated, _read_after_the_write, _filled, _written_between_two_uses]
)
def test_a_constant_written_in_place_is_new_in_each_call(code):
    model = around(Applies(code)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    for _ in range(3):
        assert_same_logits(net, model)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    net.train()
    for _ in range(2):
        sffx.local_loss(net, x, y).backward()


def _through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros(6)
    part = total[:3]
    part += x.mean()
    return x + total


def _kept_in_a_list(m: nn.Module, x: Tensor) -> Tensor:
    m.__dict__.setdefault("kept", [torch.zeros(6)])
    m.kept[0].add_(x.detach().mean(0))
    return x + m.kept[0]


@pytest.mark.parametrize("code", [_through_a_view, _kept_in_a_list])
def test_writes_that_a_graph_cannot_hold_make_a_leaf(code):
    model = around(Applies(code)).eval()
    net = cut_without_norms(copy.deepcopy(model))
    x = torch.randn(3, 6)
    for _ in range(2):
        assert_same_logits(net, model, x)
    assert leaf_names(net) == ["2"]


class _Centred(nn.Module):
    def __init__(self, update: Any) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.update = update
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        logits = self.head(self.b(y - self.centre).relu())
        self.update(self.centre, y.detach().mean(0))
        return logits


@pytest.mark.parametrize(
    "update",
    [
        lambda buffer, new: buffer.copy_(new),
        lambda buffer, new: buffer.mul_(0.9).add_(new),
        lambda buffer, new: buffer[:4].add_(new[:4]),
        lambda buffer, new: buffer.view(2, 4)[1].lerp_(new[4:], 0.5),
        lambda buffer, new: buffer.data.add_(new),
        lambda buffer, new: buffer.__setitem__(0, new[0]),
        lambda buffer, new: torch._foreach_add_([buffer], [new]),
        lambda buffer, new: torch._foreach_lerp_([buffer[:4]], [new[4:]], 0.5),
    ],
)
def test_a_buffer_is_updated_after_its_last_use(update):
    model = _Centred(update)
    net = cut_without_norms(copy.deepcopy(model)).train()
    x = torch.randn(5, 6)
    for _ in range(3):
        assert torch.allclose(net(x)[-1], model(x), atol=1e-6)
    buffers = dict(sffx.extract(net).named_buffers())
    assert torch.allclose(buffers["centre"], model.centre)


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.steps, self.size = nn.Linear(6, 6), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.size = x.ndim
        return self.inner(x) * self.steps


def test_a_counter_makes_a_leaf():
    model = around(_Counter()).eval()
    net = cut_without_norms(copy.deepcopy(model))
    (leaf,) = net.plan.leaves
    assert (leaf.qualname, leaf.reason) == ("2", "changes its attribute 'steps' at each call")
    with pytest.raises(TraceError, match="_Counter changes its attribute 'steps' at each call"):
        sffx.plan(_Counter(), example_input=torch.randn(2, 6))


_CALLS = 0
_SEEN: dict[str, int] = {}
_SIZES: set[int] = set()


def _count_in_a_global(m: nn.Module) -> int:
    global _CALLS
    _CALLS += 1
    return _CALLS


def _count_by_another_function(m: nn.Module) -> int:
    return _count_in_a_global(m) + 1


def _count_in_a_dictionary(m: nn.Module) -> int:
    _SEEN["calls"] = _SEEN.get("calls", 0) + 1
    return _SEEN["calls"]


def _count_in_another_file(m: nn.Module) -> int:
    return _OTHER_FILE.step()


_OTHER_FILE = types.ModuleType("counts_steps")
exec(
    "STEPS = 0\ndef step():\n    global STEPS\n    STEPS += 1\n    return STEPS", vars(_OTHER_FILE)
)


def _count_in_a_default(m: nn.Module, calls: list[int] = [0]) -> int:  # noqa: B006
    calls[0] += 1
    return calls[0]


def _count_nothing(m: nn.Module) -> int:
    _SIZES.add(6)
    return len(_SIZES)


def _counting(count: Any) -> type[nn.Module]:
    """Return a class of modules that multiply by a number which each call may change."""

    class Counting(nn.Module):
        count_calls = count

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.count_calls()

    return Counting


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (_count_in_a_global, "changes the global '_CALLS' at each call"),
        (_count_by_another_function, "changes the global '_CALLS' at each call"),
        (_count_in_a_dictionary, "changes the global '_SEEN' at each call"),
        (_count_in_another_file, "changes the global 'STEPS' at each call"),
        (_count_in_a_default, "changes its attribute 'count_calls' at each call"),
        (_count_nothing, ""),
    ],
)
def test_a_counter_outside_of_the_model_makes_a_leaf(count, reason):
    _SIZES.clear()
    kind = _counting(count)
    plan = sffx.plan(around(kind()), "layer", torch.randn(2, 6))
    assert [leaf.reason for leaf in plan.leaves] == ([reason] if reason else [])
    if reason:
        with pytest.raises(TraceError, match=reason):
            sffx.plan(kind(), example_input=torch.randn(2, 6))


class _Slot:
    __slots__ = "steps"

    def __init__(self) -> None:
        self.steps = 0


class _Slots(_Slot):
    __slots__ = ("other",)


def _step_of(m: nn.Module) -> float:
    m.state.steps += 1
    return m.state.steps


def _first(m: nn.Module) -> float:
    m.state[0] += 1
    return float(m.state[0])


def _replaced(m: nn.Module) -> Any:
    m.state = m.state + 1
    return m.state


def _in_eval_mode(m: nn.Module) -> float:
    if not m.training:
        m.state += 1
    return 1.0 + m.state


def _anew(m: nn.Module) -> Any:
    m.state = torch.ones(6) * 2
    return m.state


def _beside(m: nn.Module) -> float:
    """The state is neither read nor set."""
    m.other = 1 if m.training else 3
    return float(m.other)


def _by_mode(m: nn.Module) -> float:
    m.state = 1 if m.training else 3
    return float(m.state)


@pytest.mark.parametrize(
    ("state", "read", "is_leaf"),
    [
        (np.zeros(1), _first, True),
        (bytearray(1), _first, True),
        (array.array("i", [0]), _first, True),
        (_Slot(), _step_of, True),
        (_Slots(), _step_of, True),
        (np.int64(0), _replaced, True),
        (Fraction(0), lambda m: float(_replaced(m)), True),
        (torch.zeros(1), _replaced, True),
        (random.Random(0), lambda m: m.state.random(), True),
        (np.random.default_rng(0), lambda m: float(m.state.random()), True),
        (0, _in_eval_mode, True),
        (torch.zeros(1), _anew, False),
        (0, _by_mode, False),
        (math.nan, _beside, False),
    ],
)
def test_whatever_a_module_counts_in_makes_a_leaf(state, read, is_leaf):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.state = nn.Linear(6, 6), copy.deepcopy(state)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * read(self)

    model = around(Counting())
    net = sffx.transform(model, "layer", torch.randn(2, 6), check=False)
    assert len(net.plan.leaves) == is_leaf
    assert sffx.check(model, net).difference is None


def test_a_note_names_what_the_forward_leaves_on_the_model():
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.penalty = nn.Linear(6, 6), None

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = x.square().mean()
            return self.inner(x)

    (note,) = sffx.plan(around(Leaves()), "layer", torch.randn(2, 6)).notes
    assert note == "the forward sets 2.penalty in each call, which the cut model does not"


class _Sorter(nn.Module):
    """Leaves torch, which fake tensors cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.from_numpy(x.detach().numpy().mean(0).argsort().copy())
        return self.linear(x[:, order])


class _ByValue(nn.Module):
    """Gives each value to a function of Python, which on a fake tensor ended the process."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x.detach().clone().apply_(lambda value: 2 * value)


@pytest.mark.parametrize("kind", [_Sorter, _ByValue])
def test_a_module_that_runs_on_values_alone_is_run_for_real(kind):
    model = nn.Sequential(*(nn.Linear(6, 8), nn.ReLU(), kind(), nn.ReLU(), nn.Linear(8, 4))).eval()
    x = torch.randn(3, 6)
    net = cut_without_norms(model, example=x)
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model, x)


def _sets_a_flag(m: nn.Module, x: Tensor) -> Tensor:
    if not m.done:
        m.done = True
        return x * 2
    return x


def _counts_to_two(m: nn.Module, x: Tensor) -> Tensor:
    m.calls = min(getattr(m, "calls", 0) + 1, 1)
    return x if hasattr(m, "was_called") else _first(m, x)


def _first(m: nn.Module, x: Tensor) -> Tensor:
    m.was_called = True
    return x + 1


@pytest.mark.parametrize("code", [_sets_a_flag, _counts_to_two])
def test_a_model_is_refused_before_a_first_call_that_differs_from_later_ones(code):
    module = Applies(code)
    module.done = False
    model = around(module).eval()
    with pytest.raises(TraceError, match=r"in its first call, where .*Hint: run the model once"):
        cut_without_norms(model)
    model(torch.zeros(2, 6))
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)


def _keeps_the_last_size(m: nn.Module, x: Tensor) -> Tensor:
    m.width, m.text = x.shape[1], f"{x.shape}"
    return x * m.width


def test_a_number_that_each_call_sets_anew_is_no_flag():
    model = around(Applies(_keeps_the_last_size)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)


def test_a_counter_in_the_default_of_an_overridden_method_makes_a_leaf():
    class Counts(_Named):
        def scaled(self, x: Tensor, calls: list[int] = [1]) -> Tensor:  # noqa: B006
            calls.append(1)
            return x * len(calls)

    (leaf,) = sffx.plan(around(Counts()), "layer").leaves
    assert leaf.reason == "changes its attribute 'scaled' at each call"


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.inner(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x


def test_a_counter_in_a_closure_makes_a_leaf():
    calls = [0]

    def code(m: nn.Module, x: Tensor) -> Tensor:
        calls[0] += 1
        return x * calls[0]

    (leaf,) = sffx.plan(around(Applies(code)), "layer").leaves
    assert leaf.reason == "changes its attribute 'code' at each call"
