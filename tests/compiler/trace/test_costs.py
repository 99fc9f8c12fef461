from __future__ import annotations

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.compiler.facts import Cost
from sffx.compiler.fake import fake_copy
from sffx.compiler.trace.costs import CountMacs, noting_saved
from sffx.tensors import storage_key


def test_multiply_adds_are_counted():
    cost = Cost()
    with CountMacs(cost):
        nn.Linear(6, 4)(torch.zeros(5, 6))
    assert cost.macs == 5 * 6 * 4


GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", GATES, ids=lambda kind: kind.__name__)
def test_multiply_adds_of_recurrent_layers_are_counted(kind, both_ways, layers):
    """The LSTM is one operation of torch, the others are made of products."""
    layer = kind(6, 5, layers, batch_first=True, bidirectional=both_ways)
    expected = 0
    for number in range(layers):
        inputs = 6 if number == 0 else 5 * (1 + both_ways)
        expected += (1 + both_ways) * GATES[kind] * 5 * (inputs + 5)
    cost = Cost()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, CountMacs(cost):
        fake_copy(layer, mode)(torch.zeros(3, 7, 6))
    assert cost.macs == 3 * 7 * expected


def test_what_autograd_keeps_is_noted_once_for_each_storage_and_parameters_are_not():
    layer, x = nn.Linear(6, 4), torch.ones(5, 6)
    saved: dict[int, int] = {}
    alive: list[UntypedStorage] = []
    with noting_saved(saved, alive, lambda tensor: isinstance(tensor, nn.Parameter)):
        y: Tensor = layer(x) + layer(x[:2]).sum()
    assert saved == {storage_key(x): 4 * 5 * 6}
    assert y.grad_fn is not None
