"""Random numbers of a block do not depend on what runs before it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, fx, nn

import sffx
from sffx.errors import InputError


class Dropping(nn.Module):
    """A linear layer with a shortcut, and dropout by torch and by Python's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept = nn.functional.dropout(self.linear(x), 0.5, self.training)
        if self.training and random.random() < 0.5:
            kept = 2 * kept
        return x + kept


def cut_model() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), Dropping(), Dropping(), Dropping(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).double()
    return sffx.transform(model, example_input=torch.zeros(1, 16, dtype=torch.float64))


def scores_of_blocks(net: fx.GraphModule, seed: int) -> Tensor:
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 16)
    with sffx.block_seeds(seed):
        return sffx.block_scores(net, x).detach()


def test_the_same_seed_gives_the_same_scores_whatever_was_drawn_before():
    net = cut_model()
    first = scores_of_blocks(net, seed=3)
    torch.rand(7)
    random.random()
    assert torch.equal(scores_of_blocks(net, seed=3), first)
    assert not torch.equal(scores_of_blocks(net, seed=4), first)


def test_the_random_numbers_of_the_process_stay():
    net = cut_model()
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    scores_of_blocks(net, seed=3)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_blocks_of_one_step_drop_differently():
    drop = nn.Dropout
    layers = [nn.Linear(64, 64), drop(), nn.Linear(64, 64), drop(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers)
    after = ["_1", "_3"]
    net = sffx.transform(model, after, torch.zeros(1, 64), check=False)
    kept: list[Tensor] = []
    for block in list(net.plan):
        net.get_submodule(block.target).register_forward_hook(
            lambda module, args, output: kept.append(output == 0)
        )
    with sffx.block_seeds(0):
        sffx.block_scores(net, torch.ones(2, 64))
    assert len(kept) == 2
    assert not torch.equal(kept[0], kept[1])


def test_a_seed_that_is_no_integer_is_refused():
    with pytest.raises(InputError, match="seed is 0"), sffx.block_seeds(0.5):
        pass
