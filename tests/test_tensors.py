from __future__ import annotations

import pytest
import torch
from torch import nn

import sffx
from sffx.errors import InputError
from sffx.tensors import can_learn, modules_in, storage_key


def test_views_share_the_key_of_their_storage():
    x, y = torch.zeros(6), torch.zeros(6)
    assert storage_key(x.view(2, 3)[1]) == storage_key(x)
    assert storage_key(y) != storage_key(x)


def test_floats_and_complex_numbers_can_learn():
    dtypes = (torch.float16, torch.complex64, torch.int64, torch.bool)
    assert [can_learn(torch.zeros(1, dtype=dtype)) for dtype in dtypes] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_modules_in_are_those_of_torch_in_its_order():
    shared = nn.Linear(2, 2)
    empty = nn.Sequential()
    inner = nn.Sequential(nn.ReLU(), shared, empty)
    inner.register_module("nothing", None)
    model = nn.ModuleDict({"first": shared, "inner": inner, "last": nn.ModuleList([shared, inner])})
    model["last"].append(nn.Tanh())
    script = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    for module in (model, shared, empty, script):
        assert modules_in(module) == list(module.modules())


class Hashless(nn.Linear):
    __hash__ = None


class EqualBySize(nn.Linear):
    def __eq__(self, other):
        return type(other) is type(self) and other.in_features == self.in_features


class HashedBySize(EqualBySize):
    def __hash__(self):
        return hash(self.in_features)


class HashedByList(nn.Linear):
    def __hash__(self):
        return hash([self.in_features])


class HashedByIdentity(EqualBySize):
    __hash__ = nn.Module.__hash__


def three_layers(kind):
    layers = [kind(8, 8), nn.ReLU(), kind(8, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Hashless, "has no hash"),
        (EqualBySize, "has no hash"),
        (HashedBySize, "hashed by its content"),
        (HashedByList, "hashed by its content"),
    ],
)
@pytest.mark.parametrize("place", ["model", "goodness", "norm"])
def test_modules_that_torch_would_merge_or_refuse_are_named(kind, what, place):
    x = torch.zeros(2, 8)
    model, options = three_layers(nn.Linear), {}
    if place == "model":
        model = three_layers(kind)
    elif place == "goodness":
        options = {place: lambda block, num_classes: kind(8, num_classes)}
    else:
        options = {place: lambda block: kind(8, 8)}
    with pytest.raises(InputError, match=f"{kind.__name__} .*{what}.*Hint: write __hash__"):
        sffx.transform(model, "layer", example_input=x, **options)


def test_equal_layers_that_are_hashed_by_identity_have_weights_of_their_own():
    model = three_layers(HashedByIdentity)
    net = sffx.transform(model, "layer", example_input=torch.zeros(2, 8))
    layers = [module for module in modules_in(net) if type(module) is HashedByIdentity]
    assert len(layers) == 2
    assert layers[0].weight is not layers[1].weight
