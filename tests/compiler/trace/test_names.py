"""Modules, parameters and inputs may have any name, or are refused by it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.draw.graph import block_graph
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


_INPUT_NAMES = (
    *("block_0", "readout", "plan", "goodness_0", "graph"),
    *("torch", "input", "inf", "getattr", "x", "args", "kwargs"),
    *("class", "in", "two words", "λ", "1"),
)


@pytest.mark.parametrize("name", _INPUT_NAMES)
def test_inputs_may_have_any_name(name, tmp_path):
    """Inputs as the parts of a cut model, and such as no argument of a function can be called."""
    model = _AnyInput().eval()
    x = torch.randn(3, 6)
    net = cut_without_norms(model, example={name: x})
    assert [each.name for each in net.plan.inputs] == [name]
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), sffx.extract(net)):
        assert torch.equal(each(**{name: x}), model(**{name: x}))
    assert sffx.check(model, net).passed
    sffx.local_loss(net.train(), {name: x}, torch.zeros(3, dtype=torch.int64)).backward()
    exits = sffx.EarlyExit(net, threshold=2.0)
    assert torch.equal(exits({name: x}).scores, exits(x).scores)
    graph = block_graph(net.plan).source
    assert f'"input_{name}" -> block_0' in graph or f"input_{name} -> block_0" in graph


class _Self(_AnyInput):
    def forward(this, self: Tensor) -> Tensor:
        return this.head(this.inner(self).relu() + self)


def test_an_input_may_be_called_self():
    model = _Self().eval()
    x = torch.randn(3, 6)
    net = cut_without_norms(model, example=x)
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), sffx.extract(net)):
        assert torch.equal(each(x), model(x))
    assert sffx.check(model, net).passed


def test_an_exported_file_has_the_names_of_the_model(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = cut_without_norms(_AnyInput(), example={"class": torch.randn(3, 6)})
    session = onnxruntime.InferenceSession(sffx.export_onnx(net, tmp_path / "net.onnx"))
    assert [each.name for each in session.get_inputs()] == ["class"]
