from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms, leaf_names, logits
from tests.toys import around


class _TrainBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * 2
        return self.inner(x)


def test_a_branch_on_the_mode_makes_a_leaf_that_keeps_both_branches():
    model = around(_TrainBranch())
    net = cut_without_norms(model)
    (leaf,) = net.plan.leaves
    assert (leaf.qualname, leaf.reason) == ("2", "branches on self.training")
    x = torch.randn(5, 6)
    assert_same_logits(net.train(), model.train(), x)
    assert_same_logits(net.eval(), model.eval(), x)


class _ModeDependentRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2 if self.training else x)


def test_a_root_that_branches_on_the_mode_is_refused():
    message = r"differently in train and eval mode.*Hint: move the branch into a submodule"
    with pytest.raises(TraceError, match=message):
        trace(_ModeDependentRoot())


class ModeNumber(nn.Module):
    """Reads its mode for a number, as attention does for its dropout, or for what it computes."""

    def __init__(self, form: str = "number") -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(6, 6), form

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.inner(x), 0.5 if self.training else 0.0, training=True)
        return x * 2 if self.training and self.form == "branch" else x


@pytest.mark.parametrize(
    ("whole", "first", "second"),
    [(True, True, True), (False, False, False), (True, False, True), (False, False, True)],
)
def test_a_number_that_goes_by_the_mode_stays_a_choice(whole, first, second):
    """The modes are those of the whole model and of the two modules that read theirs."""
    model = nn.Sequential(nn.Linear(6, 6), ModeNumber(), ModeNumber(), nn.Linear(6, 4))
    net = cut_without_norms(model)
    assert not net.plan.leaves
    for root in (model, *net.children()):
        modules = dict(root.train(whole).named_modules())
        for qualname, training in (("1", first), ("2", second)):
            if qualname in modules:
                modules[qualname].train(training)
    net.training = whole
    x = torch.randn(64, 6)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(logits(net, x), expected)


def test_a_branch_beside_a_number_still_makes_a_leaf():
    assert leaf_names(cut_without_norms(around(ModeNumber("branch")))) == ["2"]
