"""Checks of values are left out of a graph, and named; other branches on values are not."""

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms

LIMIT = 1e9


class Checked(nn.Module):
    """Checks values in its own forward."""

    def __init__(self, check) -> None:
        super().__init__()
        self.check = check
        self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.check(self, self.a(x)).relu()).relu())


def asserts(model, x):
    assert torch.isfinite(x).all(), f"not finite: {x}"
    return x


def raises(model, x):
    if torch.isnan(x).any():
        message = f"not a number: {x}"
        raise ValueError(message)
    return x


def raises_at_the_end(model, x):
    if (x < LIMIT).all():
        y = 2 * x
    else:
        raise ValueError("too large")
    return y


def negated_over_lines(model, x):
    assert (  # noqa: PT018
        not torch.isnan(x).any()
        # The largest value.
        and (x < LIMIT).all()
    ), "no"
    return x


def in_several_parts(model, x):
    if (model.training and not (x < LIMIT).all()) or torch.isinf(x).any() or not len(x):
        raise ValueError("too large")
    return x


def by_a_number(model, x):
    assert 2 * x.abs().max().item() + 1 >= -1 and not x.sum().item() > LIMIT  # noqa: PT018
    return x


def only_reports(model, x):
    if torch.isnan(x).any():
        print("not a number", x.shape)
    return x


CHECKS = [
    asserts,
    raises,
    raises_at_the_end,
    negated_over_lines,
    in_several_parts,
    by_a_number,
    only_reports,
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_is_left_out_and_named(check):
    model = Checked(check)
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    (note,) = net.plan.notes
    assert note.startswith("the cut model does not check the values of tensors: ")
    assert "test_value_checks.py:" in note
    assert_same_logits(net, model)


def computes(model, x):
    if torch.isnan(x).any():
        x = torch.zeros_like(x)
    return x


def computes_behind_a_check(model, x):
    if torch.isnan(x).any():
        raise ValueError("not a number")
    elif (x > LIMIT).any():  # noqa: RET506
        x = x.clamp(max=LIMIT)
    return x


def goes_on_after_an_error(model, x):
    try:
        if torch.isnan(x).any():
            raise ValueError
    except ValueError:
        x = torch.zeros_like(x)
    return x


def goes_on_after_the_error_of_a_function(model, x):
    try:
        return raises(model, x)
    except ValueError:
        return torch.zeros_like(x)


def keeps_the_number(model, x):
    largest = x.abs().max().item()
    if largest > LIMIT:
        raise ValueError("too large")
    return x / largest


def chooses(model, x):
    return x if x.sum() > 0 else -x


BRANCHES = [
    computes,
    computes_behind_a_check,
    goes_on_after_an_error,
    goes_on_after_the_error_of_a_function,
    keeps_the_number,
    chooses,
]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_that_computes_something_is_no_check(branch):
    with pytest.raises(TraceError, match="depends on the"):
        sffx.plan(Checked(branch), example_input=torch.zeros(2, 6))


def test_code_around_the_cut_may_catch_errors():
    try:
        net = cut_without_norms(Checked(asserts))
    except ValueError:
        net = None
    assert net is not None
