"""Checks of values are left out of a graph, and named; other branches on values are not."""

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError
from tests.compiler.trace import checking
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms


class Checked(nn.Module):
    """Checks values in its own forward."""

    def __init__(self, check) -> None:
        super().__init__()
        self.check = check
        self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.check(self, self.a(x)).relu()).relu())


CHECKS = [
    checking.asserts,
    checking.raises,
    checking.raises_at_the_end,
    checking.negated_over_lines,
    checking.in_several_parts,
    checking.by_a_number,
    checking.only_reports,
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_is_left_out_and_named(check):
    model = Checked(check)
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    (note,) = net.plan.notes
    assert note.startswith("the cut model does not check the values of tensors: ")
    assert "checking.py:" in note
    assert_same_logits(net, model)


BRANCHES = [
    checking.computes,
    checking.computes_behind_a_check,
    checking.goes_on_after_an_error,
    checking.goes_on_after_the_error_of_a_function,
    checking.goes_on_after_a_suppressed_error,
    checking.keeps_the_number,
    checking.chooses,
    checking.chooses_beside_a_check,
]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_that_computes_something_is_no_check(branch):
    with pytest.raises(TraceError, match="depends on the"):
        sffx.plan(Checked(branch), example_input=torch.zeros(2, 6))


def test_an_assertion_that_pytest_has_rewritten_is_a_check():
    def check(model, x):
        assert torch.isfinite(x).all()
        return x

    model = Checked(check)
    net = cut_without_norms(model).train()
    assert_same_logits(net, model)


def test_code_around_the_cut_may_catch_errors():
    try:
        net = cut_without_norms(Checked(checking.asserts))
    except ValueError:
        net = None
    assert net is not None
