from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.compiler.batch_axis import BATCH_SIZES
from sffx.compiler.facts import Facts, facts
from sffx.compiler.trace.trace import trace
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms
from tests.toys import Chain


def _facts_by_name(model: nn.Module, example: Tensor | None = None) -> dict[str, Facts]:
    return {node.name: facts(node) for node in trace(model, example).graph.nodes}


def test_the_facts_of_a_chain():
    records = _facts_by_name(Chain())
    conv, norm, relu = records["_0"], records["_1"], records["_2"]
    assert conv.example.shape == (BATCH_SIZES[0], 6, 8, 8)
    assert conv.cost.macs == BATCH_SIZES[0] * 6 * 8 * 8 * 3 * 9
    assert sum(conv.cost.saved.values()) == 4 * BATCH_SIZES[0] * 3 * 8 * 8  # its input
    assert "num_batches_tracked" in norm.buffers
    assert [node.name for node in relu.writes] == ["_1"]
    assert not conv.writes
    assert not conv.buffers
    assert records["output"] == Facts()


def test_a_number_made_from_the_batch_size_is_marked():
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) * (x.size(0) + 1) * x.size(1)

    records = _facts_by_name(Sizes(), torch.zeros(1, 6))
    marked = [record.example for record in records.values() if record.of_batch]
    assert marked == [BATCH_SIZES[0], BATCH_SIZES[0] + 1]


class _DataDependent(nn.Module):
    """A leaf whose shapes depend on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nonzero(x.sum(1) != 0)[:, 0]
        return self.inner(x).index_add(0, rows, x[rows])


def test_a_leaf_whose_shapes_depend_on_values_is_run_with_values():
    model = nn.Sequential(nn.Linear(6, 6), _DataDependent(), nn.Linear(6, 4))
    records = _facts_by_name(model)
    assert records["_1"].example.shape == (BATCH_SIZES[0], 6)
    assert records["_1"].example.requires_grad


@pytest.mark.parametrize(
    "leaf", [_DataDependent(), nn.BatchNorm1d(6, momentum=None)], ids=["rows", "mean of batches"]
)
def test_what_such_a_leaf_returns_may_be_written_in_place(leaf: nn.Module):
    layers = [nn.Linear(6, 6), leaf, nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 4)]
    model = nn.Sequential(*layers).eval()
    net = cut_without_norms(model)
    assert_same_logits(net, model)
    sffx.local_loss(net.train(), torch.randn(5, 6), torch.arange(5) % 4).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
