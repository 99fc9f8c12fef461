"""Modules, parameters and inputs may have any name, or are refused by it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms


class _Named(nn.Module):
    """A layer and a parameter with any names, at the top and below."""

    def __init__(self, layer: str, parameter: str) -> None:
        super().__init__()
        self.names = (layer, parameter)
        self.add_module(layer, nn.Sequential(nn.Linear(6, 8), nn.ReLU()))
        self.register_parameter(parameter, nn.Parameter(torch.randn(8)))
        self.below = nn.ModuleDict({layer: nn.Linear(8, 8)})
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        layer, parameter = self.names
        x = getattr(self, layer)(x) * getattr(self, parameter)
        return self.head(self.below[layer](x).relu())


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [
        ("class", "in"),
        ("None", "True"),
        ('a"b', "back\\slash"),
        ("two words", "new\nline"),
        ("ﬁ", "λ"),  # a ligature, which Python reads as two letters
        ("block_0", "readout"),
        ("classifier", "head_0"),
        ("plan", "origin"),
        ("norm_0", "goodness_0"),
        ("torch", "self"),
        ("graph", "code"),
        ("meta", "graph_"),
        ("recompile", "print_readable"),
        ("training_flag", "_tensor_constant0"),
        ("_graph", "to_folder"),
    ],
)
def test_modules_and_parameters_may_have_any_name(layer, parameter):
    model = _Named(layer, parameter).eval()
    net = cut_without_norms(model)
    x = torch.randn(3, 6)
    copies = (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), sffx.extract(net))
    for each in copies:
        assert_same_logits(each, model, x)
    assert sffx.extract(net).state_dict().keys() == model.state_dict().keys()


class _AnyInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, **inputs: Tensor) -> Tensor:
        (x,) = inputs.values()
        return self.head(self.inner(x).relu() + x)


@pytest.mark.parametrize(
    "name", ["block_0", "readout", "plan", "goodness_0", "torch", "input", "inf", "getattr"]
)
def test_inputs_may_be_called_as_the_parts_of_a_cut_model(name):
    model = _AnyInput().eval()
    x = torch.randn(3, 6)
    net = cut_without_norms(model, example={name: x})
    assert torch.equal(net(**{name: x}), model(**{name: x}))


@pytest.mark.parametrize("name", ["class", "in", "two words"])
def test_an_input_that_no_argument_can_be_called_as_is_refused(name):
    with pytest.raises(InputError, match=f"an input is called '{name}'"):
        sffx.plan(_AnyInput(), example_input={name: torch.randn(3, 6)})
