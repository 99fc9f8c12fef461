"""The ways to train that are compared: backpropagation, what saves memory there, and sffx."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sffx
from sffx.net import CutModel
from sffx.parts import head_name
from sffx.runtime.stage import placeholders_of
from tools.bench.workloads import Workload

Step = Callable[[Tensor, Tensor], object]

RATE = 1e-3


@dataclass
class Candidate:
    """A way to train: a model, its optimizer, and the step on a batch.

    Attributes:
        module: that is trained.
        optimizer: over its parameters; None where each parameter has its own.
        step: with the optimizer.
        gradients: forward and backward of the step; None where the optimizer steps in between.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    step: Step
    gradients: Step | None = None


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    Attributes:
        prepare: makes the module that is trained from a model, which is left alone.
        make: makes the step from this module and the number of smaller batches.
        needs: the module that must be installed; "" for none.
        is_for_gpu: whether it means something on a GPU only.
        is_compiled: whether it compiles, which takes a while.
    """

    prepare: Callable[[nn.Module, Workload], nn.Module]
    make: Callable[[Any, int], Candidate]
    needs: str = ""
    is_for_gpu: bool = False
    is_compiled: bool = False


# Modules


def _as_it_is(model: nn.Module, workload: Workload) -> nn.Module:
    return copy.deepcopy(model)


def _cut(model: nn.Module, workload: Workload, **options: Any) -> CutModel:
    if workload.kernel_size > 1 and "goodness" not in options:
        options["kernel_size"] = workload.kernel_size
    return sffx.transform(model, workload.policy, workload.example, **options)


def _in_blocks(model: nn.Module, workload: Workload) -> nn.Module:
    """Return the same blocks with the model's own layers, and without heads and norms."""
    with mock.patch("sffx.api.save_memory"):
        net = _cut(model, workload, norm="none")
    for i in range(len(net.plan)):
        net.set_submodule(head_name(i), nn.Identity())
    return net


# Losses


def _backpropagation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _checkpointing(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(checkpointed(net, x), y)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    """Run the blocks of a net cut without norm as one model, each under a checkpoint."""
    (placeholder,) = placeholders_of(net).values()
    values = {placeholder.name: x}
    for block in net.plan.all_blocks:
        module = net.get_submodule(block.target)
        arguments = [values[name] for name in block.inputs]
        results = checkpoint(module, *arguments, use_reentrant=False)
        if not block.sides:
            results = (results,)
        values.update(zip((block.output, *block.sides), results, strict=True))
    return values[net.plan.classifier.output]


def _deferred(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return sffx.sff_loss(net(x), y)


def _with_host_memory(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss; what the backward pass needs is kept in host memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda):
        return _backpropagation(model, x, y)


# Steps


def _adamw(module: Any) -> torch.optim.Optimizer:
    is_cut = hasattr(module, "plan") and any(True for _ in module.head_0.parameters())
    parameters = sffx.parameter_groups(module, lr=RATE) if is_cut else module.parameters()
    return torch.optim.AdamW(parameters, lr=RATE)


def _ordinary(loss: Callable[[Any, Tensor, Tensor], Tensor], module: Any, parts: int) -> Candidate:
    """Return the step of a loss with `backward` and an optimizer."""
    return _with_optimizer(loss, _adamw(module), module, parts)


def _with_optimizer(
    loss: Callable[[Any, Tensor, Tensor], Tensor], optimizer: Any, module: Any, parts: int
) -> Candidate:
    def gradients(x: Tensor, y: Tensor) -> None:
        for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            own = loss(module, some_x, some_y)
            if parts > 1:
                own = own / parts
            own.backward()

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        gradients(x, y)
        optimizer.step()

    return Candidate(module, optimizer, step, gradients)


def _in_backward(
    loss: Callable[[Any, Tensor, Tensor], Tensor], module: Any, parts: int
) -> Candidate:
    """Return the step in which each parameter is updated as soon as its gradient is there.

    Its gradient is freed at once. So gradients cannot be accumulated or clipped as a whole.
    """
    update_in_backward(module)
    return Candidate(module, None, lambda x, y: loss(module, x, y).backward())


def update_in_backward(module: nn.Module) -> None:
    """Give each parameter an AdamW of its own, which steps when its gradient is there."""
    for parameter in module.parameters():
        optimizer = torch.optim.AdamW([parameter], lr=RATE)
        parameter.register_post_accumulate_grad_hook(partial(_update, optimizer))


def _update(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    optimizer.step()
    parameter.grad = None


def _local_step(net: Any, parts: int) -> Candidate:
    optimizer = _adamw(net)
    return Candidate(net, optimizer, lambda x, y: sffx.local_step(net, x, y, optimizer))


def _in_eight_bits(
    loss: Callable[[Any, Tensor, Tensor], Tensor], module: Any, parts: int
) -> Candidate:
    from torchao.optim import AdamW8bit

    return _with_optimizer(loss, AdamW8bit(module.parameters(), lr=RATE), module, parts)


def _compiled_model(model: nn.Module, workload: Workload) -> nn.Module:
    module = copy.deepcopy(model)
    module.compile()
    return module


def _compiled_with_budget(loss: Any, module: Any, parts: int) -> Candidate:
    """Return the step of a model that the compiler lets keep half of its activations."""
    made = _ordinary(loss, module, parts)

    def step(x: Tensor, y: Tensor) -> None:
        with torch._functorch.config.patch(activation_memory_budget=0.5):
            made.step(x, y)

    return Candidate(module, made.optimizer, step)


def _compiled_blocks(model: nn.Module, workload: Workload) -> nn.Module:
    return sffx.compile(_cut(model, workload))


WAYS: dict[str, Way] = {
    "BP": Way(_as_it_is, partial(_ordinary, _backpropagation)),
    "checkpoint": Way(_in_blocks, partial(_ordinary, _checkpointing)),
    "accumulation": Way(_as_it_is, partial(_ordinary, _backpropagation)),
    "in backward": Way(_as_it_is, partial(_in_backward, _backpropagation)),
    "checkpoint, in backward": Way(_in_blocks, partial(_in_backward, _checkpointing)),
    "deferred": Way(_cut, partial(_ordinary, _deferred)),
    "local": Way(_cut, partial(_ordinary, sffx.local_loss)),
    "step": Way(_cut, _local_step),
    "kept": Way(partial(_cut, recompute=False), partial(_ordinary, sffx.local_loss)),
    "mlp": Way(partial(_cut, goodness="mlp"), partial(_ordinary, sffx.local_loss)),
    "host memory": Way(_as_it_is, partial(_ordinary, _with_host_memory), is_for_gpu=True),
    "eight bits": Way(_as_it_is, partial(_in_eight_bits, _backpropagation), needs="torchao"),
    "BP, compiled": Way(_compiled_model, partial(_ordinary, _backpropagation), is_compiled=True),
    "budget, compiled": Way(
        _compiled_model, partial(_compiled_with_budget, _backpropagation), is_compiled=True
    ),
    "local, compiled": Way(_compiled_blocks, partial(_ordinary, sffx.local_loss), is_compiled=True),
}
