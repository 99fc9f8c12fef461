from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError, TraceError
from tests.compiler.trace.oracle import (
    Applies,
    assert_same_logits,
    cut_without_norms,
    leaf_names,
)
from tests.toys import around


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: torch.stack([x[i] for i in range(len(x))]),
        lambda m, x: x.view(x.__len__(), -1),
        lambda m, x: torch.stack([x[i] for i in range(x.shape[0])]),
        lambda m, x: torch.stack([m.inner(row) for row in x]),
        lambda m, x: x * 2 if x.shape[0] == 1 else x,
        lambda m, x: x * 2 if x.size(0) in (1, 2) else x,
        lambda m, x: x * 2 if x.size(0) % 2 else x,
        lambda m, x: x * 2 if x.size(0) // 2 > 1 else x,
        lambda m, x: x * 2 if x.numel() < 40 else x,
        lambda m, x: x * min(x.shape[0], 3),
    ],
)
def test_what_a_graph_would_freeze_of_the_batch_size_makes_a_leaf(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert leaf_names(net) == ["2"]
    assert "batch size" in net.plan.leaves[0].reason
    assert_same_logits(net, model)


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x * 2 if x.shape[0] > 0 else x,
        lambda m, x: x * 2 if x.shape == (x.shape[0], 6) else x,
        lambda m, x: x * 2 if x.numel() == x.shape[0] * 6 else x,
    ],
)
def test_a_comparison_with_one_outcome_at_every_batch_size_is_traced(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)


class _Counts(nn.Module):
    """Asks for the batch size in its own forward."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code
        self.token = nn.Parameter(torch.zeros(1, 6))
        self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.code(self, self.a(x)).relu()))


def _by_kind(m, x):
    n = int(x.shape[0])
    is_number = isinstance(n, int) and type(n) == int and not isinstance(0.5, int)  # noqa: E721
    return x.view(n, 6) if is_number and issubclass(bool, int) and int("3") == 3 else x * 2


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: x.view(len(x), -1),
        lambda m, x: x + m.token.expand(len(x), -1),
        lambda m, x: torch.cat([x, torch.zeros(len(x), 6)], 1)[:, :6],
        lambda m, x: x[torch.arange(len(x))],
        lambda m, x: x * len(x.shape) if len(x) > 0 else x,
        lambda m, x: x.unflatten(0, (len(x), 1)).flatten(0, 1) + len([m.a, m.b]),
        lambda m, x: x / float(x.shape[0]),
        lambda m, x: x / float(x.shape[0] + 0.5) * float("2"),
        lambda m, x: x * int(x.shape[0] + 1),
        lambda m, x: x.view(int(x.numel()) // 6, 6),
        lambda m, x: x.view(int(x.numel() / 6), int(x.shape[1])),
        _by_kind,
    ],
)
def test_builtins_do_not_freeze_the_batch_size(code):
    model = _Counts(code)
    net = cut_without_norms(model).train()
    assert not {"len", "int", "float"} & globals().keys()
    assert not net.plan.leaves
    assert_same_logits(net, model)


def test_builtins_are_put_back_where_a_model_cannot_be_traced():
    model = _Counts(lambda m, x: torch.stack([x[i] for i in range(len(x))]))
    with pytest.raises(TraceError, match="batch size is read as a plain number"):
        sffx.plan(model, example_input=torch.zeros(3, 6))
    assert "len" not in globals()


def test_a_name_of_the_files_own_is_no_builtin(monkeypatch):
    monkeypatch.setitem(globals(), "len", lambda x: 2)
    model = _Counts(lambda m, x: x * len(x))
    net = cut_without_norms(model).train()
    assert_same_logits(net, model)
    assert len("abc") == 2


class _ForOneSample(nn.Module):
    """Does something else with a batch of one sample, in its own forward."""

    def __init__(self, is_one) -> None:
        super().__init__()
        self.is_one = is_one
        self.a, self.norm, self.fc = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y if self.is_one(self, x) else self.norm(y)
        return self.fc(y.relu())


@pytest.mark.parametrize(
    ("is_one", "in_eval"),
    [
        (lambda m, x: m.training and x.shape[0] == 1, False),
        (lambda m, x: m.training and len(x.shape) == 2 and x.size(0) < 2, False),
        (lambda m, x: x.shape[0] == 1, True),
        (lambda m, x: not x.shape[0] > 1 and m.training, True),
    ],
)
def test_a_batch_of_one_that_the_forward_treats_by_itself_is_refused(is_one, in_eval):
    torch.manual_seed(0)
    model = _ForOneSample(is_one)
    net = sffx.transform(model, policy="layer", example_input=torch.zeros(2, 6), norm="none")
    assert any("batch of one sample" in note for note in net.plan.notes)
    assert not net.plan.leaves
    sffx.check(model, net)
    for training in (True, False):
        net.train(training)
        net(torch.randn(5, 6))
        if training or in_eval:
            with pytest.raises(InputError, match="batch of one sample"):
                net(torch.randn(1, 6))
        else:
            net.readout.mode = "classifier"
            x = torch.randn(1, 6)
            torch.testing.assert_close(net(x), sffx.extract(net).eval()(x))


def test_a_branch_on_another_batch_size_is_refused():
    model = _ForOneSample(lambda m, x: m.training and x.shape[0] == 2)
    with pytest.raises(TraceError, match="batch size"):
        sffx.transform(model, policy="layer", example_input=torch.zeros(2, 6))


def test_a_batch_that_has_fewer_parts_is_refused():
    def code(module: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(3))])

    model = around(Applies(code)).eval()
    net = sffx.transform(model, "layer", norm="none", check=False)
    net.readout.mode = "classifier"
    assert any("into 3 parts" in note for note in net.plan.notes)
    assert_same_logits(net, model, torch.randn(6, 6), torch.randn(7, 6))
    with pytest.raises(InputError, match="computes something else at this size"):
        net(torch.randn(2, 6))
