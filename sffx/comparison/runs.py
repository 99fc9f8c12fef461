"""One run of a model and of its trunk, under the same conditions."""

from __future__ import annotations

import io
import random
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sffx.blocks import BlockPlan
from sffx.comparison.trunk import Trunk
from sffx.compiler.plan_notes import DRAWS_IN_ANOTHER_ORDER
from sffx.compiler.trace.checkpointing import LEFT_OUT as CHECKPOINTING_LEFT_OUT
from sffx.compiler.trace.checkpointing import left_out
from sffx.compiler.trace.randomness import generators_restored
from sffx.plain import logits_of
from sffx.tensors import as_dense

_SEED = 1

_CHECKING = threading.RLock()

# The largest relative error that rounding explains, by dtype.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALF_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Run:
    """The conditions of one call.

    Attributes:
        name: of the comparison.
        training: whether the call is in train mode.
        values: the arguments by name.
        grad: whether autograd records the call.
        backward: whether gradients are compared as well.
        only_elsewhere: whether a difference here does not touch training and evaluation on inputs
            like the example.
    """

    name: str
    training: bool
    values: dict[str, Any]
    grad: bool = True
    backward: bool = False
    only_elsewhere: bool = False


@dataclass
class Outcome:
    """What one call gave.

    Attributes:
        logits: (B, J); whatever else the call returned in their place; None where it failed.
        failure: the error that it ended in.
        gradients: of the parameters, by name, where they were asked for.
        draws: the state of torch's generator afterwards. It shows how much was drawn.
    """

    logits: Any = None
    failure: Exception | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    draws: Tensor | None = None


def run_model(model: nn.Module, run: Run, plan: BlockPlan) -> Outcome:
    """Run the plain model, given the plan of the cut one."""
    args, kwargs = plan.call_arguments(copied(run.values))

    def call() -> Any:
        return logits_of(model(*args, **kwargs), plan.task, plan.num_classes, plan.output_keys)

    named = dict(model.named_parameters(remove_duplicate=False))
    with _compared(plan):
        return _outcome(model, run, call, named)


def run_trunk(trunk: Trunk, run: Run) -> Outcome:
    """Run the trunk of the cut model."""
    values = copied(run.values)
    named = {}
    for name, tensors in trunk.state().items():
        # Not by the class: the parameters of a copied script are plain tensors.
        if tensors[0].requires_grad:
            named[name] = tensors[0]
    with _compared(trunk.plan):
        return _outcome(trunk, run, lambda: trunk(values), named)


@contextmanager
def _compared(plan: BlockPlan) -> Iterator[None]:
    """Set aside what the notes of a plan say that the blocks do otherwise than the model.

    These are the order of draws and gradient checkpointing.
    """
    with ExitStack() as stack:
        if DRAWS_IN_ANOTHER_ORDER in plan.notes:
            stack.enter_context(_EqualDraws())
        if CHECKPOINTING_LEFT_OUT in plan.notes:
            stack.enter_context(left_out())
        yield


class _EqualDraws(TorchDispatchMode):
    """Lets each operation draw the same random numbers, whatever was drawn before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            seed()
        return func(*args, **(kwargs or {}))


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in memory of their own, since a model may write on its input."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest value; infinite where nothing compares."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    found, expected = as_dense(found.detach()), as_dense(expected.detach())
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else float("inf")
    odd = ~expected.isfinite()
    if not torch.equal(odd, ~found.isfinite()):
        return float("inf")
    found, expected = found.masked_fill(odd, 0), expected.masked_fill(odd, 0)
    error = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    if error == 0:
        return 0.0
    return error / largest if largest else float("inf")


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative error that counts as rounding."""
    return _TOLERANCES.get(dtype, _HALF_TOLERANCE)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Hold the generators of random numbers, and show no warning of a model that runs anew."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    on_devices = torch.random.fork_rng(devices=list(devices))
    # A graph module prints its code where it fails.
    unprinted = redirect_stderr(io.StringIO())
    # Threads check one after the other, since they set the same generators.
    with _CHECKING, generators_restored(), on_devices, unprinted, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def seed() -> None:
    """Set all generators."""
    # Not torch.manual_seed: it looks for devices that are not there, which takes milliseconds.
    torch.random.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)


def _outcome(model: nn.Module, run: Run, call: Any, named: dict[str, Any]) -> Outcome:
    outcome = Outcome()
    try:
        model.train(run.training)
        seed()
        with torch.set_grad_enabled(run.grad):
            outcome.logits = call()
        outcome.draws = torch.get_rng_state()
        if run.backward:
            outcome.gradients = _gradients(outcome.logits, named)
    except Exception as failure:
        outcome.failure = failure
    return outcome


def _gradients(logits: Any, named: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """Return the gradients of a random mixture of the logits, by the names of the parameters."""
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        return {}
    generator = torch.Generator().manual_seed(_SEED)
    mixture = torch.randn(logits.shape, generator=generator).to(logits)
    names = [name for name, parameter in named.items() if parameter.requires_grad]
    parameters = [named[name] for name in names]
    gradients = torch.autograd.grad((logits * mixture).sum(), parameters, allow_unused=True)
    return dict(zip(names, gradients, strict=True))
