from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.leaves import add_leaves, has_no_code, is_layer, leaf_records
from tests.toys import Chain, DataBranch, Residual, around


class _Attention(nn.MultiheadAttention):
    pass


class _OwnSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(), True),
        (nn.MultiheadAttention(4, 2), True),  # has children
        (_Attention(4, 2), True),
        (nn.Sequential(nn.ReLU()), False),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, batch_first=True), 1), False),
        (Residual(), False),
    ],
)
def test_a_trace_stops_at_layers(module, expected):
    assert is_layer(module) is expected


def test_containers_have_no_code_of_their_own():
    assert has_no_code(Chain())
    assert not has_no_code(_OwnSequential(nn.ReLU()))


def test_leaves_within_leaves_have_no_record():
    model = around(nn.Sequential(DataBranch(), DataBranch()))
    reasons = {}
    add_leaves(reasons, model, nn.Sequential, "a reason")
    add_leaves(reasons, model, DataBranch, "another")
    assert reasons == {"2": "a reason", "2.0": "another", "2.1": "another"}
    (record,) = leaf_records(model, reasons)
    assert (record.qualname, record.kind, record.reason) == ("2", "Sequential", "a reason")
    assert record.share == pytest.approx(84 / 154)


class _TakesOut(nn.Module):
    """Changes the list and the mapping that it is given, and branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, values: list[Tensor], options: dict[str, Tensor]) -> Tensor:
        x = values.pop()
        values.append(options.pop("shift"))
        return self.inner(x * 2 if x.abs().sum() > 0 else x) + sum(values)


class _Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.part, self.head = nn.Linear(6, 8), _TakesOut(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.part([x, x * 2], {"shift": x + 1}).relu())


def test_a_leaf_may_change_the_lists_that_it_is_given():
    net = sffx.transform(_Gives(), "layer", torch.randn(4, 6), check=True)
    assert [leaf.qualname for leaf in net.plan.leaves] == ["part"]
