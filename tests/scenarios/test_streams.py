"""Cuts across several values keep every promise of the design."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.analyse import Analysis
from sffx.errors import CutError
from tests.random_models import models
from tests.stream_models import CLASSES, Fusion, HRNet, Pairs, TwoStreams, UNet
from tests.stream_programs import stream_programs
from tests.toys import step_scores

EXAMPLES = int(os.environ.get("SFFX_EXAMPLES", "6"))
BATCH = 5

bounded = settings(
    max_examples=EXAMPLES,
    derandomize="SFFX_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

NETS: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "unet": (UNet, ((3, 16, 16),)),
    "hrnet": (HRNet, ((3, 16, 16),)),
    "two streams": (TwoStreams, ((3, 4, 6, 6), (2, 4, 6, 6))),
    "pairs": (Pairs, ((6, 3),)),
    "fusion": (Fusion, ((3, 8, 8), (5,))),
}


def everywhere(analysis: Analysis) -> list[Any]:
    """Cut after each node where it is allowed, across all values that cross there."""
    flow = analysis.flow
    names = [name for name in flow.nodes if flow.leads_to_logits(name)]
    cut_sets = {}
    for i in range(len(names) - 1):
        crossing = flow.crossing(set(names[: i + 1]))
        cut_sets[frozenset(crossing)] = None
    finest = analysis.with_cut_sets(tuple(cut_sets))
    return list(finest.candidates)


def some(analysis: Analysis) -> list[Any]:
    cuts = everywhere(analysis)
    return cuts[1::3] or cuts


policies = st.sampled_from(["residual", "batchnorm", "layer", "module(1)", everywhere, some])


def example(shapes: tuple[tuple[int, ...], ...], batch: int = BATCH) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, *shape, dtype=torch.float64) for shape in shapes)


def cut(model: nn.Module, x: tuple[Tensor, ...], policy: Any, norm: str) -> fx.GraphModule:
    """Cut a model; one without a place for a cut is no example."""
    # With as many classes as channels of the image, the task is not clear.
    task = sffx.tasks.Segmentation() if getattr(model, "is_dense", False) else None
    check = norm == "none" or "auto"
    try:
        return sffx.transform(model, policy, x, norm=norm, check=check, task=task)
    except CutError as error:
        message = str(error)
        assume("no node to cut at" not in message and "found no block" not in message)
        assume("reads what it wrote by another name" not in message)
        raise


def assert_keeps_promises(model: nn.Module, x: tuple[Tensor, ...], policy: Any) -> None:
    assert_trunk_is_the_model(model, x, policy)
    net = cut(model, x, policy, "layer").train()
    assert_each_parameter_learns_in_its_block(net, x)
    assert_local_loss_is_the_deferred_one(net, x)


def assert_trunk_is_the_model(model: nn.Module, x: tuple[Tensor, ...], policy: Any) -> None:
    net = cut(model, x, policy, "none")
    net.readout.mode = "classifier"
    for training in (True, False):
        with torch.no_grad():
            expected = copy.deepcopy(model).train(training)(*x)
            found = copy.deepcopy(net).train(training)(*x)
        torch.testing.assert_close(found[-1] if training else found, expected, rtol=1e-9, atol=1e-9)
    extracted = sffx.extract(net).eval()
    assert torch.equal(extracted(*x), copy.deepcopy(model).eval()(*x))


def assert_trunk_is_the_model_at_other_sizes(
    model: nn.Module, x: tuple[Tensor, ...], policy: Any
) -> None:
    net = cut(model, x, policy, "none").eval()
    net.readout.mode = "classifier"
    for batch, sides in ((1, (4, 4)), (3, (6, 5)), (2, (2, 3))):
        other = tuple(torch.randn(batch, 3, *sides, dtype=torch.float64) for _ in x)
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(*other)
            torch.testing.assert_close(net(*other), expected, rtol=1e-9, atol=1e-9)


def targets(net: fx.GraphModule) -> Tensor:
    """Return classes of the samples, or of pixels some of which are left out."""
    shape = torch.Size(net.plan.classifier.shape[1:])
    y = (torch.arange(BATCH * shape.numel()) % CLASSES).view(BATCH, *shape)
    if shape:
        y[:, 0] = net.plan.task.ignore_index
    return y


def assert_each_parameter_learns_in_its_block(net: fx.GraphModule, x: tuple[Tensor, ...]) -> None:
    y = targets(net)
    parameters = dict(net.named_parameters())
    blocks_of: dict[str, list[str]] = {name: [] for name in parameters}
    for block, scores in zip(net.plan.all_blocks, step_scores(net, *x), strict=True):
        if not scores.requires_grad:
            continue
        loss = nn.functional.cross_entropy(scores, y)
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                blocks_of[name].append(block.target)
    for name, blocks in blocks_of.items():
        assert blocks == [sffx.parts.owner_of(name)], name


def assert_local_loss_is_the_deferred_one(net: fx.GraphModule, x: tuple[Tensor, ...]) -> None:
    twin = copy.deepcopy(net)
    y = targets(net)
    torch.manual_seed(1)
    deferred = sffx.sff_loss(net(*x), y, task=net.plan.task)
    deferred.backward()
    torch.manual_seed(1)
    local = sffx.local_loss(twin, x if len(x) > 1 else x[0], y)
    local.backward()
    torch.testing.assert_close(local, deferred, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)


@bounded
@given(stream_programs(), policies)
def test_random_streams(drawn, policy):
    model, inputs = drawn
    x = example(((3, 4, 4),) * inputs)
    assert_keeps_promises(model.double(), x, policy)
    assert_trunk_is_the_model_at_other_sizes(model, x, policy)


@bounded
@given(models(), st.sampled_from([everywhere, some]))
def test_random_models_are_cut_across_several_values(drawn, policy):
    model, shape = drawn
    x = example((shape,))
    model.double()
    try:
        copy.deepcopy(model)(*x).sum().backward()
    except RuntimeError:  # an in-place operation wrote on a value that another one keeps
        assume(False)
    net = cut(model, x, policy, "none")
    net.readout.mode = "classifier"
    torch.manual_seed(0)
    expected = copy.deepcopy(model).train()(*example((shape,), 3))
    assert expected.shape == (3, CLASSES)
    net = cut(model, x, policy, "layer").train()
    assert_local_loss_is_the_deferred_one(net, x)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("policy", ["residual", everywhere])
def test_nets_of_streams(name, policy):
    make, shapes = NETS[name]
    torch.manual_seed(0)
    assert_keeps_promises(make().double(), example(shapes), policy)
