"""What a forward decides by the sizes of its input is symbolic, or settled with a note."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.sizes import SETTLED_BY_SIZE, is_guard
from sffx.errors import ExportError, InputError, TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms


def _padded(x: Tensor) -> Tensor:
    extra = -x.shape[-1] % 8
    return F.pad(x, (0, extra)) if extra else x


def _scaled(x: Tensor) -> Tensor:
    return x * float(x.shape[2])


def _at_most_eight(x: Tensor) -> Tensor:
    """Takes smaller images only, as positions do that are read up to the number of tokens."""
    positions = x.new_ones(8, 8)[: x.shape[2], : x.shape[3]]
    return x * 2 + positions if x.shape[2] > 4 else x + positions


def _of_a_fixed_size(x: Tensor) -> Tensor:
    assert x.shape[2] == 8
    return x * 2 if x.shape[1] == 3 and x.shape[3] == 8 else x


def _symbolic(x: Tensor) -> Tensor:
    return x * x.shape[2] + x.new_ones(x.shape[2:])


def _by_the_number_of_axes(x: Tensor) -> Tensor:
    return x[None] if x.ndim == 3 else x * x.shape[1]


class _Net(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.code = code
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.code(x)
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


def _by_range(x: Tensor) -> Tensor:
    return x * 2 if x.shape[-1] > 12 else x


def _by_table(x: Tensor) -> Tensor:
    return x * {8: 1.0, 16: 2.0}.get(x.shape[-1], 3.0)


def _row_by_row(x: Tensor) -> Tensor:
    return torch.stack([row * i for i, row in enumerate(x.unbind(2))], 2)


def _by_length(x: Tensor) -> Tensor:
    return x * len(x[0, 0])


def _by_count(x: Tensor) -> Tensor:
    return x * 2 if x[0].numel() > 300 else x


def _by_stride(x: Tensor) -> Tensor:
    return x * 2 if x.stride(1) > 100 else x


def _by_name(x: Tensor) -> Tensor:
    return x * {"width 8": 1.0, "width 16": 2.0}.get(f"width {x.shape[-1]}", 3.0)


def _by_text(x: Tensor) -> Tensor:
    return x * len(str(x.size(3)))


def _by_rounded(x: Tensor) -> Tensor:
    return x * (1.0 if int(x.shape[-1] / 8) == 1 else 2.0)


def _by_a_tensor_of_sizes(x: Tensor) -> Tensor:
    widths = torch.arange(x.shape[-1])
    return x * 2 if (widths > 9).any() else x


def _by_a_number_of_sizes(x: Tensor) -> Tensor:
    return x * int(torch.full((x.shape[-1], 2), 0.25).sum()) + torch.eye(x.shape[-1]).sum().item()


def _asserted(x: Tensor) -> Tensor:
    torch._assert(x.shape[-1] < 16, "too wide")
    return x


_DECISIONS = (
    _padded,
    _scaled,
    _by_range,
    _by_table,
    _row_by_row,
    _by_length,
    _by_count,
    _by_stride,
    _by_name,
    _by_text,
    _by_rounded,
    _by_a_tensor_of_sizes,
    _by_a_number_of_sizes,
)


@pytest.mark.parametrize("code", [*_DECISIONS, _at_most_eight])
def test_a_decision_that_another_size_changes_is_noted(code):
    plan = sffx.plan(_Net(code), "layer", torch.randn(1, 3, 8, 8))
    assert SETTLED_BY_SIZE in plan.notes


@pytest.mark.parametrize("code", [*_DECISIONS, _asserted])
def test_a_size_is_computed_as_in_the_model_or_refused(code):
    model = _Net(code).eval()
    net = cut_without_norms(model, example=torch.randn(1, 3, 8, 8))
    copied = pickle.loads(pickle.dumps(net))
    taken, refused = [], []
    for width in range(4, 26):
        x = torch.randn(2, 3, width, width)
        for each in (net, copied):
            found = _answer(each, x)
            if isinstance(found, Tensor):
                assert torch.equal(found, model(x))
                taken.append(width)
            else:
                assert "computes something else at this size" in found
                refused.append(width)
    assert 8 in taken
    assert refused
    x = torch.randn(2, 3, refused[-1], refused[-1])
    with pytest.raises(InputError, match="computes something else at this size"):
        sffx.local_loss(net.train(), x, torch.zeros(2, dtype=torch.int64))


def _answer(net: nn.Module, x: Tensor) -> Tensor | str:
    """Return the logits, or the error in words."""
    try:
        return net(x)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    "value",
    [
        lambda m, x: torch.arange(x.shape[-1]) * x.mean(),
        lambda m, x: torch.arange(x.shape[-1]) * m.a.weight.sum(),
        lambda m, x: torch.rand(x.shape[-1]),
        lambda m, x: torch.arange(x.shape[0]),
        lambda m, x: torch.zeros(x.shape[-1]).add_(x.mean()),
    ],
)
def test_a_branch_on_what_is_not_made_of_sizes_alone_is_refused(value):
    class Net(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if value(self, x).sum() > 1 else x)

    with pytest.raises(TraceError, match="a branch depends on"):
        sffx.plan(Net(_symbolic), "layer", torch.randn(1, 3, 8, 8))


def test_sizes_that_an_input_cannot_change_are_not_guarded():
    """The number of channels is one, and a decision by it costs nothing."""

    def by_channels(x: Tensor) -> Tensor:
        if x.shape[1] != 3 or len(x[0]) != 3:
            raise ValueError
        return x * (2 if x.shape[2] == x.shape[3] * 1.0 else 1)

    net = cut_without_norms(_Net(by_channels), example=torch.randn(1, 3, 8, 8))
    guards = [node for node in net.block_0.graph.nodes if is_guard(node)]
    assert [guard.args[1] for guard in guards] == [True]


def test_a_guard_stays_in_the_block_that_computes_the_value():
    """It makes no side value of a value inside a block."""

    class Net(_Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y.sigmoid() if y.shape[-1] > 12 else y.relu()
            return self.head(self.b(y).relu().mean((2, 3)))

    net = cut_without_norms(Net(_symbolic), example=torch.randn(1, 3, 8, 8))
    assert all(block.sides == () for block in net.plan)
    assert any(map(is_guard, net.block_0.graph.nodes))


@pytest.mark.parametrize("code", [_of_a_fixed_size, _symbolic, _by_the_number_of_axes])
def test_a_decision_that_no_size_changes_is_not_noted(code):
    model = _Net(code).eval()
    net = cut_without_norms(model, example=torch.randn(1, 3, 8, 8))
    assert SETTLED_BY_SIZE not in net.plan.notes
    assert_same_logits(net, model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("code", [_padded, _by_range])
def test_a_file_of_any_size_is_tried_on_both_sides_of_a_decision(code, tmp_path):
    pytest.importorskip("onnxruntime")
    net = cut_without_norms(_Net(code), example=torch.randn(1, 3, 8, 8))
    sffx.export_onnx(net, tmp_path / "fixed.onnx")
    for export in (sffx.export_onnx, sffx.export_program):
        with pytest.raises(ExportError, match="computes something else at this size"):
            export(net, tmp_path / "open", dynamic_size=True)
    assert any(is_guard(node) for node in net.block_0.graph.nodes)  # the net keeps its own
