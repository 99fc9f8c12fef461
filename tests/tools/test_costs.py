"""Costs of methods relative to one of them."""

import torch
from torch import nn

from sffx.memory.count import count_memory
from tools.costs import Training, relative_costs


def training(width: int) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
    return Training(
        model,
        torch.optim.AdamW(model.parameters()),
        lambda: model(torch.ones(8, 4)).square().mean(),
    )


def test_costs_are_ratios_of_counted_bytes_and_one_for_the_method_itself():
    found = relative_costs({"small": training(16), "large": training(64)}, "small", rounds=2)
    counts = {}
    for width in (16, 64):
        each = training(width)
        each.step()
        counts[width] = count_memory(each.step, model=each.model, optimizer=each.optimizer)
    peak = counts[16].peak
    assert found["small"] == {"time": 1, "peak": 1, "activations": 1, "peak_bytes": peak}
    assert found["large"]["peak"] == counts[64].peak / counts[16].peak
    assert found["large"]["activations"] == counts[64].activations / counts[16].activations
    assert found["large"]["time"] > 0


def test_memory_is_that_of_the_larger_of_two_steps():
    odd = iter([False, True] * 10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    def loss():
        return model(torch.ones(400 if next(odd) else 8, 4)).square().mean()

    def large():
        return model(torch.ones(400, 4)).square().mean()

    optimizer = torch.optim.AdamW(model.parameters())
    trainings = {
        "large": Training(model, optimizer, large),
        "every second": Training(model, optimizer, loss),
    }
    found = relative_costs(trainings, "large", rounds=2)
    assert found["every second"]["peak"] == 1
    odd = iter([True, False] * 10)
    assert relative_costs(trainings, "large", rounds=2)["every second"]["peak"] == 1


def test_a_step_uses_the_gradients_of_its_own_loss_alone():
    each = training(4)
    twin = training(4)
    for _ in range(2):
        each.step()
        twin.optimizer.zero_grad()
        twin.loss().backward()
        twin.optimizer.step()
    assert all(
        torch.equal(p, q)
        for p, q in zip(each.model.parameters(), twin.model.parameters(), strict=True)
    )
