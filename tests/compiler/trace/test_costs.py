from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage, nn

from sffx.compiler.facts import Cost
from sffx.compiler.trace.costs import CountMacs, noting_saved
from sffx.tensors import storage_key


def test_multiply_adds_are_counted():
    cost = Cost()
    with CountMacs(cost):
        nn.Linear(6, 4)(torch.zeros(5, 6))
    assert cost.macs == 5 * 6 * 4


def test_what_autograd_keeps_is_noted_once_for_each_storage_and_parameters_are_not():
    layer, x = nn.Linear(6, 4), torch.ones(5, 6)
    saved: dict[int, int] = {}
    alive: list[UntypedStorage] = []
    with noting_saved(saved, alive, lambda tensor: isinstance(tensor, nn.Parameter)):
        y: Tensor = layer(x) + layer(x[:2]).sum()
    assert saved == {storage_key(x): 4 * 5 * 6}
    assert y.grad_fn is not None
