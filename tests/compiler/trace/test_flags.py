from __future__ import annotations

import torch
from torch import nn

from sffx.compiler.trace.flags import PlantedFlag, TrainingFlag, lift_flags, plant_flags
from tests.compiler.trace.oracle import cut_without_norms, logits
from tests.toys import ModeDropout


def test_training_flags_follow_the_mode_of_their_owner():
    net = cut_without_norms(ModeDropout())
    x = torch.randn(64, 6)
    model = net.origin.model
    for training in (True, False, True):
        net.train(training)
        model.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(logits(net, x), expected)
    assert sum(isinstance(m, TrainingFlag) for m in net.modules()) == 1


def test_flags_are_planted_where_the_trace_goes_through_and_lifted_again():
    model = nn.Sequential(ModeDropout(), nn.ReLU()).train()
    plant_flags(model, lambda module, qualname: not any(module.children()))
    planted = {name: module.training for name, module in model.named_modules()}
    targets = {name: flag.target for name, flag in planted.items() if type(flag) is PlantedFlag}
    assert targets == {"": "training_flag", "0": "0.training_flag"}
    lift_flags(model)
    assert all(module.training is True for module in model.modules())
    assert not any(module._buffers for module in model.modules())
