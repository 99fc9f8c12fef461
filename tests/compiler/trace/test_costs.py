from __future__ import annotations

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sffx
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
    given = {storage_key(p) for p in layer.parameters()}
    with noting_saved(saved, alive, given):
        y: Tensor = layer(x) + layer(x[:2]).sum()
    assert saved == {storage_key(x): 4 * 5 * 6}
    assert y.grad_fn is not None


def _tokens():
    return nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), Mean())


class Mean(nn.Module):
    """Averages tokens, and tells four classes apart."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(x.mean(1))


MODELS = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 4)
        ),
        lambda samples: torch.rand(samples, 6),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 4)
        ),
        lambda samples: torch.rand(samples, 2, 6, 6),
    ),
    "tokens": (_tokens, lambda samples: torch.randint(9, (samples, 5))),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_blocks_keep_is_what_a_step_keeps_beside_the_weights(kind):
    make, inputs = MODELS[kind]
    net = sffx.transform(make(), "layer", inputs(2), norm="none")
    own = {storage_key(p) for p in net.parameters()}
    samples = 7
    x = inputs(samples)
    assert len(net.plan) == 2
    for block in net.plan:
        kept: dict[int, int] = {}
        alive: list[UntypedStorage] = []
        with noting_saved(kept, alive, own):
            y = net.get_submodule(block.target)(x)
        assert samples * block.activation_bytes == sum(kept.values())
        x = y.detach().requires_grad_()
