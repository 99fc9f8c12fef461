"""Weights that an embedding and an output layer share."""

from __future__ import annotations

import copy

import torch
from torch import nn

import sffx
from sffx.compiler.untie import untied


def test_a_shared_weight_is_untied_in_a_copy():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Flatten(), nn.Linear(8, 5))
    model[2].weight = model[0].weight
    copied, notes = untied(model)
    assert copied[2].weight is not copied[0].weight
    assert torch.equal(copied[2].weight, model[2].weight)
    assert model[2].weight is model[0].weight
    assert len(notes) == 1


def test_a_spectral_norm_computes_nothing_when_a_model_is_cut():
    """To read its weight in train mode would take a step towards the largest singular value."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = copy.deepcopy(model.state_dict())
    net = sffx.transform(model, "layer", torch.zeros(1, 6), norm="none")
    for state in (model.state_dict(), sffx.extract(net).state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in before)
