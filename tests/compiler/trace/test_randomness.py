from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import sffx
from sffx.compiler.trace.randomness import call_without_draws, generators_restored
from sffx.compiler.trace.trace import trace
from tests.compiler.trace.oracle import Applies, assert_same_logits, cut_without_norms
from tests.toys import around

DRAWS = [
    random.random,
    np.random.rand,
    lambda: torch.rand(()).item(),
    lambda: torch.randn(()).item(),
]
READ_BY_C = [
    lambda: math.log(random.random()),
    lambda: torch.tensor(random.random()),
    lambda: torch.ones(6) * np.random.uniform(),
    lambda: torch.full((6,), torch.rand(()).item()),
]
FROZEN = [*DRAWS, lambda: random.random(), lambda: np.random.uniform(), *READ_BY_C]


def _states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("draw", FROZEN)
def test_random_numbers_drawn_on_the_side_make_a_leaf(draw):
    model = around(Applies(lambda m, x: x * draw()))
    before = _states()
    (leaf,) = trace(model).leaves
    assert leaf.qualname == "2"
    assert "draws random numbers" in leaf.reason
    assert _states() == before


@pytest.mark.parametrize("draw", DRAWS)
def test_generators_are_restored_and_a_draw_is_refused(draw):
    before = _states()
    with generators_restored():
        with pytest.raises(RuntimeError, match="draws random numbers"):
            call_without_draws(draw)
        assert _states() != before
    assert _states() == before
    assert call_without_draws(lambda: 3) == 3


class _Depth(nn.Module):
    """Drops layers with a probability, by some code that draws."""

    def __init__(self, draws, probability: float) -> None:
        super().__init__()
        self.draws, self.probability = draws, probability
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer, drops in zip(self.layers, self.draws(self.probability), strict=True):
            if self.training and drops:
                continue
            x = x + layer(x).relu()
        return x


DEPTHS = [
    lambda p: [random.random() < p for _ in range(3)],
    lambda p: [random.uniform(0, 1) < p for _ in range(3)],
    lambda p: [np.random.rand() < p for _ in range(3)],
    lambda p: [1 - p <= np.random.uniform(0.0, 1.0) for _ in range(3)],
    lambda p: [torch.rand(1).item() < p for _ in range(3)],
    lambda p: [torch.rand([]) < p for _ in range(3)],
    lambda p: [not torch.rand(1) > p for _ in range(3)],
    lambda p: [random.random() <= p for _ in range(3)],
    lambda p: torch.rand(3) < p,
    lambda p: [not keeps for keeps in torch.rand(3) >= p],
]


@pytest.mark.parametrize("draws", DEPTHS)
def test_a_layer_that_is_never_dropped_makes_no_leaf(draws):
    for probability, leaves in ((0.0, []), (0.3, ["0"])):
        model = nn.Sequential(_Depth(draws, probability), nn.Linear(6, 4))
        before = _states()
        plan = sffx.plan(model, example_input=torch.zeros(1, 6), policy="residual")
        assert [leaf.qualname for leaf in plan.leaves] == leaves
        assert _states() == before
        assert len(plan) == (1 if leaves else 3)


@pytest.mark.parametrize(
    "noise",
    [
        lambda: torch.rand(6),
        lambda: torch.randn(1),
        lambda: torch.randn((6,)).abs(),
        lambda: torch.randint(0, 9, (6,)),
        lambda: torch.randint(9, size=(1, 6)),
        lambda: torch.randperm(6),
        lambda: torch.normal(0.0, 1.0, (6,)),
        lambda: torch.normal(torch.zeros(6), 1.0),
    ],
)
def test_noise_is_drawn_in_each_call(noise):
    for model in (around(Applies(lambda m, x: x + noise())), _Noisy(noise)):
        _assert_noisy(model)


class _Noisy(nn.Module):
    """Draws in its own forward, in each mode something else."""

    def __init__(self, noise) -> None:
        super().__init__()
        self.noise = noise
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.noise() if self.training else x * self.noise() + 1
        return self.head(x.relu())


def _assert_noisy(model: nn.Module) -> None:
    net = sffx.transform(model, "layer", torch.zeros(2, 6), norm="none")
    assert net.plan.leaves == ()
    x = torch.randn(3, 6)
    # Two calls may agree: a ReLU hides noise that is negative.
    first, *others = [net.eval()(x) for _ in range(16)]
    assert not all(torch.equal(first, each) for each in others)
    assert sffx.check(model, net).passed


class _DropsInTraining(nn.Module):
    """Draws in train mode alone, as layer drop does."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand(1) > self.probability:
                x = x + layer(x).relu()
        return x


def test_layers_that_are_never_dropped_in_training_make_no_leaf():
    torch.manual_seed(0)
    for probability, leaves in ((0.0, []), (0.3, ["2"])):
        stem = [nn.Linear(6, 6), nn.Dropout(0.5)]
        drops = _DropsInTraining(probability)
        model = nn.Sequential(*stem, drops, nn.Dropout(0.5), nn.Linear(6, 4))
        net = sffx.transform(model, policy="layer", example_input=torch.zeros(2, 6), norm="none")
        assert [leaf.qualname for leaf in net.plan.leaves] == leaves
        assert sffx.check(model, net).passed
        net.readout.mode = "classifier"
        x = torch.randn(3, 6)
        for training in (True, False):
            ends = []
            for each in (model, pickle.loads(pickle.dumps(net))):
                torch.manual_seed(1)
                scores = each.train(training)(x)
                logits = scores[-1] if scores.ndim == 3 else scores
                ends.append((logits, torch.rand(1)))
            torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: torch.rand(6, generator=g),
        lambda g: torch.randn(6, generator=g),
        lambda g: torch.randint(0, 5, (6,), generator=g),
        lambda g: torch.randperm(6, generator=g),
        lambda g: torch.normal(0.0, 1.0, (6,), generator=g),
    ],
)
def test_draws_by_a_generator_of_its_own_make_a_leaf(draw):
    module = Applies(lambda m, x: x + draw(m.generator))
    module.generator = torch.Generator().manual_seed(1)
    model = around(module)
    net = cut_without_norms(model)
    assert "generator of its own" in net.plan.leaves[0].reason
    assert_same_logits(net.eval(), model.eval())


def test_a_table_that_is_drawn_after_a_seed_is_a_constant():
    def project(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            table = torch.randn(6, 6)
        return x @ table

    model = around(Applies(project)).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)


def test_a_draw_of_a_distribution_is_no_seed():
    beta = torch.distributions.Beta(0.4, 0.4)
    model = around(Applies(lambda m, x: beta.sample() * torch.randn_like(x)))
    (leaf,) = trace(model).leaves
    assert "draws random numbers that do not depend" in leaf.reason
    assert "seed" not in leaf.reason
