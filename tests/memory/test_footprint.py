"""Predicted peaks against counted ones, and the policy that cuts for a budget."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import sffx
from sffx.blocks import Options
from sffx.compiler.analyse import analyse
from sffx.compiler.trace.trace import trace
from sffx.errors import CutError, InputError
from sffx.memory.count import count_memory
from tests.toys import Chain, Residual, SharedBias, TwoInputs

MIB = 2**20


def counted(net: nn.Module, batch_size: int, mode: FakeTensorMode | None) -> int:
    """Count the second step with AdamW, on fake tensors where there is a mode."""
    if mode is not None:
        with FakeCopyMode(mode):
            return counted_in(copy.deepcopy(net), batch_size, mode)
    return counted_in(copy.deepcopy(net), batch_size, torch.enable_grad())


def counted_in(net: nn.Module, batch_size: int, context: object) -> int:
    with context:
        x = tuple(
            torch.ones((batch_size, *i.shape)).to(getattr(torch, i.dtype)) for i in net.plan.inputs
        )
        y = torch.zeros(batch_size, dtype=torch.int64)
        optimizer = torch.optim.AdamW(
            sffx.parameter_groups(net.train(), lr=1e-3, classifier_lr=1e-3)
        )

        def step() -> None:
            sffx.local_loss(net, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return count_memory(step, model=net, optimizer=optimizer).peak


def vision_transformer(num_classes: int) -> nn.Module:
    """A ViT of two layers."""
    return torchvision.models.VisionTransformer(64, 16, 2, 4, 64, 128, num_classes=num_classes)


ARCHITECTURES = {
    "resnet18": (torchvision.models.resnet18, (3, 32, 32), 1000, 128),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, (3, 64, 64), 10, 64),
    "vision_transformer": (vision_transformer, (3, 64, 64), 100, 16),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_predicted_peak_is_the_counted_one(name):
    build, shape, classes, batch_size = ARCHITECTURES[name]
    net = sffx.transform(build(num_classes=classes), "residual", torch.zeros(1, *shape))
    predicted = sffx.footprint(net, batch_size).peak
    assert predicted == pytest.approx(
        counted(net, batch_size, FakeTensorMode(allow_non_fake_inputs=True)), rel=0.001
    )


@pytest.mark.parametrize(
    ("model", "example", "policy"),
    [
        (Chain(), torch.zeros(1, 3, 8, 8), "batchnorm"),
        (Residual(), torch.zeros(1, 3, 8, 8), "residual"),
        (SharedBias(), torch.zeros(1, 6), "layer"),
        (TwoInputs(), (torch.zeros(1, 6), torch.zeros(1, 5)), "layer"),
    ],
    ids=["chain", "residual", "side value", "two inputs"],
)
@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_predicted_peak_is_that_of_a_real_step(model, example, policy, batch_size):
    net = sffx.transform(model, policy, example)
    assert sffx.footprint(net, batch_size).peak == pytest.approx(
        counted(net, batch_size, None), rel=0.05
    )


def test_a_prediction_touches_nothing_and_prints_as_a_table():
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8)).eval()
    before = copy.deepcopy(net.state_dict())
    rng = torch.get_rng_state()
    found = sffx.footprint(net, 64)
    assert torch.equal(rng, torch.get_rng_state())
    assert not net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert found.peak == max(found.peaks)
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "MiB,",
        "batch",
        "64",
        "block",
        "alone",
        "peak",
        "of",
        "the",
        "step",
    ]
    assert [line.split()[0] for line in lines[1:-1]] == [
        "block_0",
        "block_1",
        "block_2",
        "classifier",
        "optimizer.step()",
    ]


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
                peak = sffx.footprint(sffx.transform(model, cuts, example), batch_size).peak
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


def test_the_budget_is_met_by_the_coarsest_cuts_that_can():
    model, example, batch_size = _Narrowing(), torch.zeros(1, 3, 8, 8), 100
    least = best_by_trying(model, example, batch_size)
    for budget in (*least.values(), 10 * MIB):
        fewest = min(size for size, peak in least.items() if peak <= budget)
        net = sffx.transform(model, sffx.policies.memory(budget, batch_size), example)
        assert len(net.plan) == fewest
        assert sffx.footprint(net, batch_size).peak == least[fewest]


@pytest.mark.parametrize("batch_size", [0, -3, 2.0, True])
def test_batch_size_that_is_none_is_refused(batch_size):
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"batch_size is .*\. Hint: pass a positive integer"):
        sffx.footprint(net, batch_size)


def test_a_budget_that_cannot_be_met_names_the_smallest_peak():
    model, example = _Narrowing(), torch.zeros(1, 3, 8, 8)
    smallest = min(best_by_trying(model, example, 100).values())
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
