"""The policy that cuts for a memory budget; the oracle tries all cuts."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

import sffx
from sffx.blocks import Options
from sffx.compiler.analyse import analyse
from sffx.compiler.trace.trace import trace
from sffx.errors import CutError
from sffx.tables import MIB
from tests.memory.steps import counted
from tests.toys import Residual


def best_by_trying(model: nn.Module, example: torch.Tensor, batch_size: int) -> dict[int, int]:
    """Return the least peak of all cuts into each number of feature blocks.

    The last block ends where the features end.
    """
    analysis = analyse(trace(model, example))
    features = sffx.policies.batchnorm(analysis, Options()).after
    places = sorted(
        {*features, *sffx.policies.layer(analysis, Options()).after}, key=analysis.spine.index
    )
    least: dict[int, int] = {}
    for size in range(1, len(places) + 1):
        for cuts in combinations(places, size):
            if places.index(cuts[-1]) >= places.index(features[-1]):
                net = sffx.transform(model, cuts, example, check=False)
                peak = sffx.footprint(net, batch_size, backpropagation=False).peak
                least[size] = min(peak, least.get(size, peak))
    return least


class _Narrowing(nn.Sequential):
    def __init__(self) -> None:
        widths = (3, 8, 8, 6, 6, 4)
        layers = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
        ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(4 * 64, 4))


@pytest.fixture(scope="module")
def least() -> dict[int, int]:
    """The smallest peak of a batch of 100 by the number of blocks."""
    return best_by_trying(_Narrowing(), torch.zeros(1, 3, 8, 8), 100)


def test_the_budget_is_met_by_the_coarsest_cuts_that_can(least):
    model, example, batch_size = _Narrowing(), torch.zeros(1, 3, 8, 8), 100
    for budget in (*least.values(), 10 * MIB):
        fewest = min(size for size, peak in least.items() if peak <= budget)
        net = sffx.transform(model, sffx.policies.memory(budget, batch_size), example)
        assert len(net.plan) == fewest
        assert sffx.footprint(net, batch_size).peak == least[fewest]


def test_a_budget_that_cannot_be_met_names_the_smallest_peak(least):
    model, example = _Narrowing(), torch.zeros(1, 3, 8, 8)
    smallest = min(least.values())
    with pytest.raises(
        CutError,
        match=(
            r"batch size 100 within 64\.00 KiB: "
            rf"the smallest achievable peak is {smallest / 1024:.2f} KiB"
        ),
    ):
        sffx.plan(model, "memory(64 KiB, 100)", example)


def test_a_budget_does_not_part_batchnorm_and_counts_real_steps():
    budget = 2 * MIB
    rng = torch.get_rng_state()
    net = sffx.transform(Residual(), f"memory({budget}, batch_size=64)", torch.zeros(1, 3, 8, 8))
    assert net.plan.policy == f"memory({budget}, batch_size=64)"
    assert counted(net, 64, None) <= budget
    torch.set_rng_state(rng)
    again = sffx.transform(
        Residual(), [block.output for block in net.plan], torch.zeros(1, 3, 8, 8)
    )
    assert torch.equal(net.head_0.weight, again.head_0.weight)  # the search drew no random numbers


def test_a_budget_is_that_of_the_heads_the_model_is_cut_with():
    model, example = _Narrowing(), torch.zeros(1, 3, 8, 8)
    assert sffx.footprint(sffx.transform(model, f"memory({MIB}, 100)", example), 100).peak <= MIB
    net = sffx.transform(model, f"memory({2 * MIB}, 100)", example, goodness="mlp(256, 4)")
    assert sffx.footprint(net, 100).peak <= 2 * MIB
    for cut in (sffx.plan, sffx.transform):
        with pytest.raises(CutError, match=r"within 1\.00 MiB: the smallest achievable peak is 1"):
            cut(model, sffx.policies.memory(MIB, 100), example, goodness="mlp(256, 4)")


def test_a_model_without_a_layer_before_the_classifier_has_no_block():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(x * self.scale))

    with pytest.raises(CutError, match="found no block besides the classifier"):
        sffx.plan(Scaled(), "memory(1 GiB, 8)")
