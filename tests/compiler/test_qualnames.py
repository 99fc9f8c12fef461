from __future__ import annotations

import torch
from torch import nn

from sffx.compiler.qualnames import holders, in_common, outermost, parameters_of


def test_holders_are_innermost_first():
    assert list(holders("a.b.c")) == ["a.b", "a"]
    assert list(holders("a")) == []


def test_outermost_names_keep_their_order():
    assert outermost(["b.c", "a", "b", "a.d.e", "bb.c", "b"]) == ["a", "b", "bb.c"]


def test_names_that_differ_in_numbers_are_one():
    names = ["a.0.b", "c.1", "a.12.b", "a2.0", "4"]
    assert in_common(names) == ["a.*.b", "c.1", "a2.0", "4"]


def test_parameters_of_a_module_of_a_parameter_and_of_a_buffer():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)))
    assert parameters_of(model, "0").keys() == {"0.0.weight", "0.0.bias"}
    assert parameters_of(model, "0.0.weight") == {"0.0.weight": model[0][0].weight}
    assert parameters_of(model, "0.0.running_mean") == {}
    assert torch.is_tensor(model[0][0].running_mean)
