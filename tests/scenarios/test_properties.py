"""Random models keep every promise of the design."""

from __future__ import annotations

import copy
import os

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import sffx
from sffx.compiler.analyse import Analysis, analyse
from sffx.compiler.trace.trace import trace
from sffx.errors import CutError
from tests.random_models import CLASSES, Program, models
from tests.toys import step_scores

# For a longer search: SFFX_EXAMPLES=2000 python -m pytest tests/scenarios/test_properties.py
EXAMPLES = int(os.environ.get("SFFX_EXAMPLES", "8"))
BATCH = 5

policies = st.sampled_from(
    ["residual", "batchnorm", "layer", "module(1)", "stages(1)", "every", "some"]
)
bounded = settings(
    max_examples=EXAMPLES,
    derandomize="SFFX_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def every(analysis: Analysis) -> list[str]:
    return list(analysis.candidates)


def some(analysis: Analysis) -> list[str]:
    return list(analysis.candidates[1::2] or analysis.candidates)


def cut(model: nn.Module, shape: tuple[int, ...], policy: str, norm: str) -> fx.GraphModule:
    """Cut a model. One without a place for a cut, or that cannot be trained, is no example."""
    assume(trains(model, shape))
    chosen = {"every": every, "some": some}.get(policy, policy)
    try:
        x = torch.zeros(1, *shape, dtype=torch.float64)
        # Everything is compared where the whole net is to be the model.
        check = True if norm == "none" else "auto"
        return sffx.transform(model, chosen, x, norm=norm, check=check)
    except CutError as error:
        assume(
            "no node to cut at" not in str(error)
            and "found no block" not in str(error)
            and "stages(1) asks" not in str(error)
        )
        assume("reads what it wrote by another name" not in str(error))
        raise


def trains(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether backpropagation runs.

    An in-place operation may have written on a value that another one keeps.
    """
    twin = copy.deepcopy(model).train()
    try:
        twin(torch.randn(BATCH, *shape, dtype=torch.float64)).sum().backward()
    except RuntimeError:
        return False
    return True


def seeded(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return module(x)


def state(model: nn.Module) -> dict[str, object]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        **tensors,
        "modules": [
            (name, module.training, type(module)) for name, module in model.named_modules()
        ],
    }


def assert_same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


@bounded
@given(models(), policies, st.booleans())
def test_without_norm_the_trunk_is_the_model(drawn, policy, training):
    model, shape = drawn
    model.double().train(training)
    before = state(model)
    net = cut(model, shape, policy, "none")
    assert_same(before, state(model))
    net.readout.mode = "classifier"
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    for mode in (True, False):
        found = seeded(net.train(mode), x.clone())
        torch.testing.assert_close(
            found[-1] if mode else found, seeded(model.train(mode), x.clone()), rtol=1e-9, atol=1e-9
        )
    extracted = sffx.extract(net)
    assert type(extracted) is Program
    assert_same(state(model), state(extracted))
    assert torch.equal(seeded(extracted, x.clone()), seeded(model, x.clone()))


@bounded
@given(models(), policies, st.sampled_from(["layer", "none"]))
def test_each_parameter_learns_from_its_own_block_only(drawn, policy, norm):
    model, shape = drawn
    net = cut(model.double(), shape, policy, norm).train()
    x, y = torch.randn(BATCH, *shape, dtype=torch.float64), torch.arange(BATCH) % CLASSES
    parameters = dict(net.named_parameters())
    for k, scores in enumerate(step_scores(net, x.clone())):
        own = ("classifier",) if k == len(net.plan) else (f"block_{k}", f"head_{k}")
        loss = nn.functional.cross_entropy(scores, y)
        found = (
            torch.autograd.grad(
                loss, list(parameters.values()), allow_unused=True, retain_graph=True
            )
            if loss.requires_grad
            else ()
        )
        reached = {
            name for name, gradient in zip(parameters, found, strict=False) if gradient is not None
        }
        assert {name.partition(".")[0] for name in reached} <= set(own)
    owners = [
        id(p)
        for part in (*net.plan, net.plan.classifier)
        for p in net.get_submodule(part.target).parameters()
    ]
    assert len(owners) == len(set(owners))
    plain = torch.autograd.grad(
        model.train()(x.clone()).sum(), list(model.parameters()), allow_unused=True
    )
    used = {
        name
        for (name, _), gradient in zip(model.named_parameters(), plain, strict=True)
        if gradient is not None
    }
    assert used <= {name for part in (*net.plan, net.plan.classifier) for name in part.parameters}


@bounded
@given(models(), policies)
def test_a_block_local_step_is_the_deferred_one(drawn, policy):
    model, shape = drawn
    net = cut(model.double(), shape, policy, "layer").train()
    twin = copy.deepcopy(net)
    x, y = torch.randn(BATCH, *shape, dtype=torch.float64), torch.arange(BATCH) % CLASSES
    torch.manual_seed(1)
    deferred = sffx.sff_loss(net(x.clone()), y)
    deferred.backward()
    torch.manual_seed(1)
    local = sffx.local_loss(twin, x.clone(), y)
    local.backward()
    torch.testing.assert_close(local, deferred, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    for p, q in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(p, q)


@bounded
@given(models(), policies)
def test_blocks_are_well_formed(drawn, policy):
    model, shape = drawn
    net = cut(model.double(), shape, policy, "layer")
    net.graph.lint()
    analysis = analyse(trace(model, torch.zeros(1, *shape, dtype=torch.float64)))
    parts = (*net.plan, net.plan.classifier)
    assert sorted(name for part in parts for name in part.nodes) == sorted(
        name for step in analysis.steps for name in step.nodes
    )
    for part in parts:
        net.get_submodule(part.target).graph.lint()
        assert set(part.detached) <= set(part.sides)
        assert not [name for name in part.nodes if is_parted(analysis, name, part)]


def is_parted(analysis: Analysis, name: str, part: sffx.Block) -> bool:
    """Return whether a node is a BN layer that reads the output of a layer of another block.

    A sum that feeds a shortcut as well may be cut.
    """
    node = analysis.nodes[name]
    if node.op != "call_module" or not isinstance(
        analysis.trace.root.get_submodule(node.target), nn.modules.batchnorm._BatchNorm
    ):
        return False
    feeder = node.all_input_nodes[0]
    is_layer = any(p.ndim > 1 for p in analysis.parameters(feeder).values())
    return (
        feeder.op != "placeholder"
        and feeder.name not in part.nodes
        and (is_layer or len(feeder.users) == 1)
    )
