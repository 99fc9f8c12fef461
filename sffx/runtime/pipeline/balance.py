"""Divide blocks among processes, so that the slowest process is as fast as can be.

The blocks are timed, since multiply-adds alone say little: the optimizer takes time as well, and
layers differ in how fast they multiply.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from sffx.blocks import BlockPlan
from sffx.errors import InputError
from sffx.inputs import bind, random_batch
from sffx.kernels.precision import widened
from sffx.net import plan_of
from sffx.runtime.gradients import block_gradients
from sffx.runtime.randomness import untouched_randomness
from sffx.runtime.stage import Stage, Values, stages_of
from sffx.runtime.walk import input_values, score_detached
from sffx.tensors import as_dense, copied

# Samples of the random batch, where no batch was given.
SAMPLES = 32
_REPEATS = 3


def seconds_of_blocks(net: fx.GraphModule, x: Any, device: torch.device) -> list[float]:
    """Return the seconds that each block takes for a training step, the optimizer included.

    The model stays as it is, its running statistics and the random numbers of the process
    included: copies of the blocks run, one at a time.

    Args:
        net: what `transform` returned. It may be on the meta device.
        x: a batch, or None for a random one of 32 samples.
        device: to run on.
    """
    plan = plan_of(net)
    bound = bind(plan, x) if x is not None else _random_inputs(plan)
    values = input_values(net, _on(device, _dtype_of(net), bound))
    seconds = []
    # Each stage leaves in `values` what the next one reads.
    with untouched_randomness():
        for stage in stages_of(net):
            with _copies_in_place(net, stage, device):
                seconds.append(_seconds(stage, values, device))
    return seconds


def balanced(seconds: Sequence[float], stages: int, tied: Mapping[int, str]) -> list[int]:
    """Return the index of the first block of each stage, so that the slowest stage is fastest.

    Args:
        seconds: of each block.
        stages: how many to make.
        tied: blocks that must not begin a stage, as `inseparable` returns them.

    Raises:
        InputError: there are fewer places to divide at than stages need.
    """
    count = len(seconds)
    allowed = [i for i in range(1, count) if i not in tied]
    if len(allowed) < stages - 1:
        shared = ""
        if tied:
            names = ", ".join(dict.fromkeys(tied.values()))
            shared = f", since blocks share {names}"
        raise InputError(
            f"{stages} processes share {count} blocks (the classifier included) that can be "
            f"divided at {len(allowed)} places{shared}. Hint: start {len(allowed) + 1} processes "
            "or fewer, use replicas=, or cut the model into more blocks"
        )
    # The best division of the first `end` blocks, by `end`: into one stage, then into one more in
    # each round. A division is the seconds of its slowest stage, and where its stages begin.
    ends = [*allowed, count]
    best: dict[int, _Division] = {}
    for end in ends:
        best[end] = (sum(seconds[:end]), [0])
    for _ in range(stages - 1):
        best = _with_one_more_stage(best, seconds, ends)
    _, begins = best[count]
    return begins


_Division: TypeAlias = tuple[float, list[int]]


def _with_one_more_stage(
    best: Mapping[int, _Division], seconds: Sequence[float], ends: Sequence[int]
) -> dict[int, _Division]:
    """Return the best divisions into one stage more, by the number of blocks that they divide.

    Args:
        best: the best divisions, by the number of blocks.
        seconds: of each block.
        ends: where a stage may end.
    """
    longer: dict[int, _Division] = {}
    for end in ends:
        for begin, (slowest, begins) in best.items():
            if begin >= end:
                continue
            # The new stage has the blocks from `begin` to `end`. Of two equally slow divisions,
            # the one with the earlier beginnings is taken.
            candidate = (max(slowest, sum(seconds[begin:end])), [*begins, begin])
            if end not in longer or candidate < longer[end]:
                longer[end] = candidate
    return longer


def _random_inputs(plan: BlockPlan) -> dict[str, Any]:
    """Return a random batch by the names of the inputs."""
    tensors = random_batch(plan.inputs, SAMPLES)
    return {each.name: tensor for each, tensor in zip(plan.inputs, tensors, strict=True)}


def _seconds(stage: Stage, values: Values, device: torch.device) -> float:
    """Return the seconds of a step on one stage, and hand its output on to the values.

    Args:
        stage: to run several times.
        values: that the stage reads. Afterwards they are those that later stages read.
        device: that they are on.
    """
    parameters = stage.trainable
    # AdamW takes no empty list.
    optimizer = torch.optim.AdamW(parameters or [nn.Parameter(torch.zeros(()))], lr=0.0)
    measured = []
    for _ in range(1 + _REPEATS):
        # A run removes values that no later block reads, and the next run needs them again.
        own = dict(values)
        _synchronize(device)
        start = time.perf_counter()
        scores = score_detached(stage, own)
        _step(scores, parameters, optimizer)
        _synchronize(device)
        measured.append(time.perf_counter() - start)
    stage.hand_on(own)
    values.clear()
    values.update(tree_map_only(Tensor, Tensor.detach, own))
    # The first run prepares kernels, and the state of the optimizer.
    return median(measured[1:])


def _step(scores: Any, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Learn from a loss that takes as little time as one can."""
    if not parameters or not scores.requires_grad:
        return
    gradients = block_gradients(widened(scores).square().mean(), parameters)
    for parameter, gradient in gradients.items():
        # AdamW takes no sparse gradients.
        parameter.grad = as_dense(gradient)
    optimizer.step()


@contextmanager
def _copies_in_place(net: fx.GraphModule, stage: Stage, device: torch.device) -> Iterator[None]:
    """Put copies of the modules of a stage in their places, on a device, with some weights."""
    originals = {name: net.get_submodule(name) for name in stage.parts}
    try:
        for name, module in originals.items():
            setattr(net, name, _runnable_copy(module, device))
        yield
    finally:
        for name, module in originals.items():
            setattr(net, name, module)


def _runnable_copy(module: nn.Module, device: torch.device) -> nn.Module:
    runnable = copied(module)
    tensors = [*runnable.parameters(), *runnable.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return runnable.to(device)
    runnable.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*runnable.parameters(), *runnable.buffers()):
            # Any number that leads to no denormal ones, with which a CPU computes more slowly.
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return runnable


def _on(device: torch.device, dtype: torch.dtype | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs on a device. Floats get the dtype of the model's parameters."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return {name: tree_map_only(Tensor, moved, value) for name, value in inputs.items()}


def _dtype_of(net: nn.Module) -> torch.dtype | None:
    floats = (p.dtype for p in net.parameters() if p.is_floating_point())
    return next(floats, None)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
