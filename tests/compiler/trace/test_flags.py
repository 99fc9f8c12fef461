from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.flags import TrainingFlag
from sffx.errors import TraceError
from tests.compiler.trace.oracle import cut_without_norms, logits
from tests.toys import ModeDropout, around


def test_training_flags_follow_the_mode_of_their_owner():
    net = cut_without_norms(ModeDropout())
    x = torch.randn(64, 6)
    model = net.origin.model
    for training in (True, False, True):
        net.train(training)
        model.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(logits(net, x), expected)
    assert sum(isinstance(m, TrainingFlag) for m in net.modules()) == 1


class _Positions(nn.Module):
    """A layer that is not called. Its method reads its mode, as that of rotary embeddings does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(6))

    def shifted(self, x: Tensor) -> Tensor:
        table = self.table
        if self.training:
            table = table * 2 + x.mean()
        return x + table


class _ReadsALayersMode(nn.Module):
    """Reads the mode of a layer from outside of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.drop, self.second = nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 6)
        self.positions = _Positions()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "argument":
            x = F.dropout(x, self.drop.p, self.drop.training)
        elif self.how == "branch" and self.drop.training:
            x = x * 2 + 1
        elif self.how == "number":
            x = x * (0.5 if self.first.training else 1.0)
        elif self.how == "method":
            x = self.positions.shifted(x)
        return self.second(x.relu())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", ["argument", "branch", "number", "method"])
def test_the_mode_of_a_layer_may_be_read_outside_of_it(how, inside):
    model = around(_ReadsALayersMode(how)) if inside else _ReadsALayersMode(how)
    net = sffx.transform(model, "layer", torch.randn(2, 6), check=False)
    report = sffx.check(model, net, raises=False)
    assert report.passed, report
    assert not net.plan.leaves
    x = torch.randn(4, 6)
    with torch.no_grad():
        outputs = {}
        for training in (True, False):
            model.train(training)
            torch.manual_seed(0)
            outputs[training] = model(x)
    assert not torch.equal(outputs[True], outputs[False])


class _ReadsTwoModes(_ReadsALayersMode):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.first.training and self.drop.training:
            x = x * 2
        return self.second(x.relu())


def test_a_branch_on_the_modes_of_two_layers_makes_a_leaf():
    model = around(_ReadsTwoModes(""))
    net = sffx.transform(model, "layer", torch.randn(2, 6))
    assert [leaf.reason for leaf in net.plan.leaves] == ["branches on self.training"]
    with pytest.raises(TraceError, match=r"branch on self\.training"):
        sffx.transform(_ReadsTwoModes(""), "layer", torch.randn(2, 6))
