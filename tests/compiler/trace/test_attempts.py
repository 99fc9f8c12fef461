from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms, leaf_names
from tests.compiler.trace.test_modes import ModeNumber
from tests.toys import DataBranch, LayerDrop, around


def test_a_branch_on_data_makes_a_leaf():
    model = around(DataBranch()).eval()
    net = cut_without_norms(model)
    (leaf,) = net.plan.leaves
    assert leaf.qualname == "2"
    assert leaf.kind == "DataBranch"
    assert leaf.share == pytest.approx(42 / 112)
    assert "toys.py" in leaf.reason
    assert_same_logits(net, model, torch.randn(5, 6))


def test_all_modules_of_an_untraceable_class_become_leaves_at_once():
    model = nn.Sequential(nn.Linear(6, 6), *(DataBranch() for _ in range(12)), nn.Linear(6, 4))
    assert len(trace(model).leaves) == 12


class _BranchInside(nn.Module):
    """A branch on what the module itself computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h if h.sum() > 0 else h * 2


class _Gate(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if h.sum() > 0 else h * 2


@pytest.mark.parametrize("make", [_BranchInside, lambda: _Gate(nn.Linear(6, 6))])
def test_a_branch_on_computed_values_makes_a_leaf(make):
    model = around(make()).eval()
    net = cut_without_norms(model)
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model, torch.randn(3, 6))


class _UntraceableRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return -self.inner(x)


def test_an_untraceable_forward_names_the_class_the_line_and_the_way_out():
    message = (
        r"_UntraceableRoot cannot be traced: .*test_attempts\.py:\d+, in forward\)\. "
        r"Hint: move this code"
    )
    with pytest.raises(TraceError, match=message):
        trace(_UntraceableRoot())


class _SetsItsWindow(nn.Module):
    """Sets an attribute by the size of its input and reads it in the next forward.

    transformers' Swin does so with its windows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.window = nn.Linear(6, 6), 10

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.window:
            self.window = x.shape[1]
        return self.inner(x) * self.window


@pytest.mark.parametrize(
    "other", [ModeNumber(), DataBranch()], ids=["traced in both modes", "traced again for a leaf"]
)
def test_what_a_forward_sets_does_not_outlive_an_attempt_to_trace_it(other):
    model = nn.Sequential(nn.Linear(6, 6), _SetsItsWindow(), other, nn.Linear(6, 4)).eval()
    net = cut_without_norms(model)
    assert "1" not in leaf_names(net)
    assert model[1].window == 10
    assert_same_logits(net, model, torch.randn(5, 6))


class _AssignsBuffer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.way == "in training":
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        elif self.way == "data":
            self.mean.data = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        else:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return torch.relu(y - self.mean)


@pytest.mark.parametrize("way", ["always", "in training", "data"])
def test_a_module_that_assigns_its_buffer_becomes_a_leaf(way):
    torch.manual_seed(0)
    layers = (nn.Linear(6, 6), _AssignsBuffer(way), _AssignsBuffer(way), nn.Linear(6, 3))
    model, x = nn.Sequential(*layers), torch.randn(8, 6)
    net = cut_without_norms(model, example=x).train()
    assert_same_logits(net, model, x, x, x)
    assert torch.equal(sffx.extract(net)[1].mean, model[1].mean)
    assert leaf_names(net) == ["1", "2"]


def test_a_model_that_assigns_its_own_buffer_is_refused():
    message = r"assigns its buffer 'mean'.*Hint: write into the buffer, self\.mean\.copy_"
    with pytest.raises(TraceError, match=message):
        sffx.transform(_AssignsBuffer("always"), example_input=torch.zeros(2, 6))


class _MovesBuffer(nn.Module):
    """Keeps its table on the device of its input, as CTRL in transformers does."""

    def __init__(self, *like: Any) -> None:
        super().__init__()
        self.like, self.linear = like, nn.Linear(6, 6)
        self.register_buffer("table", torch.randn(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.table = self.table.to(x.device).to(*self.like)
        return torch.relu(self.linear(x) + self.table.to(x.dtype))


@pytest.mark.parametrize(
    ("like", "leaves"), [("cpu", []), (torch.float64, []), (torch.float32, ["1"])]
)
def test_a_module_that_moves_its_buffer_is_traced_unless_it_changes_the_dtype(like, leaves):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(6, 6), _MovesBuffer(like), nn.Linear(6, 3)),
        torch.randn(8, 6),
    )
    net = cut_without_norms(model, example=x).train()
    assert leaf_names(net) == leaves
    assert_same_logits(net, model, x, x)
    assert torch.equal(sffx.extract(net)[1].table, model[1].table)


def test_a_branch_on_random_numbers_makes_a_leaf():
    assert [leaf.qualname for leaf in trace(around(LayerDrop())).leaves] == ["2"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            lambda m, x: torch.func.functionalize(torch.neg)(x),
            r"calls aten\.neg\.default where a trace",
        ),
        (lambda m, x: x / x.max().item(), r"a number is read from a tensor"),
        (lambda m, x: x + torch.Tensor(x.shape[0], 6), r"got \(a traced value, int\)"),
    ],
    ids=["functionalize", "item", "Tensor"],
)
def test_what_the_model_itself_cannot_do_names_the_line_and_the_way_out(code, message):
    root = type("Root", (nn.Module,), {"forward": lambda m, x: m.layer(code(m, x))})()
    root.layer = nn.Linear(6, 3)
    with pytest.raises(TraceError, match=rf"{message}.*test_attempts\.py:\d+, .*function of the f"):
        sffx.plan(root, "layer", torch.zeros(2, 6))


class _OneSize(nn.Module):
    """Runs with 6 samples alone, by a function of a state of that size."""

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.positions = nn.Parameter(torch.randn(6, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.memory = nn.GRU(8, 8, batch_first=True)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self, self.inner(x)))


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: (x + m.positions).mean(0),  # the steps come first
        lambda m, x: m.attention(*[x + m.positions] * 3)[0][-1],
        lambda m, x: x.view(6, 5, 8).mean(1),
        lambda m, x: m.memory(x, torch.zeros(1, 6, 8))[0][:, -1],
    ],
)
def test_a_model_of_one_batch_size_is_told_that_the_first_axis_is_the_batch(code):
    model, x = _OneSize(code), torch.randn(6, 5, 3)
    assert model(x).ndim == 2
    said = "runs with 6 samples, .* and not with 12: .* Hint: the first axis of each input is the"
    with pytest.raises(TraceError, match=said):
        sffx.plan(model, "layer", x)
