from __future__ import annotations

import pytest
import torch
from torch import nn

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
