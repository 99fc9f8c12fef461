"""What is counted in the code of compiled steps, without compiling any C++."""

from __future__ import annotations

import torch
from torch import nn

import sffx
from tools.compiled import by_backpropagation, by_local_loss


def test_kernels_and_operators_are_those_of_a_small_step_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = by_backpropagation(model, x, y)
    # Forward and backward. The loss lies outside of the model.
    assert found.graphs == 2
    # Two products forward; the gradients of two weights and of the hidden value.
    assert found.operators == 5
    # ReLU; its gradient; the gradients of two biases. Some may be fused.
    assert 2 <= found.kernels <= 4
    assert 0 < len(found.sources) <= found.kernels
    assert found.calls == found.kernels + found.operators
    assert found.nodes > found.operators


def test_a_local_step_has_a_graph_for_each_distinct_block():
    torch.manual_seed(0)
    equal = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), *equal, nn.Linear(6, 3))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    found = by_local_loss(model, x, y)
    # The four layers are alike, the last one is the classifier.
    assert len(sffx.plan(model, example_input=x)) == 4
    assert found.graphs == 2
    # Each of the four has at least the product of its layer and two of its head's, and the
    # gradients of the weights.
    assert found.operators >= 4 * 4
