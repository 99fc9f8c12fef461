"""Count memory, arithmetic and operations of a step on fake tensors: nothing is computed."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sffx.compiler.fake import fake_copy
from sffx.memory.count import count_memory
from sffx.parts import head_name
from tools.bench.ways import WAYS
from tools.bench.workloads import Workload
from tools.operations import counted_operations

Counts = dict[str, float]

MEMORY = (
    "parameters",
    "gradients",
    "optimizer_state",
    "optimizer_temporaries",
    "activations",
    "peak",
)


def _product(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]


# Forms of products that torch's counter does not know.
MORE_PRODUCTS = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten.addbmm_: _product,
    torch.ops.aten.addbmm: _product,
    torch.ops.aten._addmm_activation: _product,
}


class FreeHead(nn.Module):
    """A head without products: the mean square of a block's output, the same for every class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, y: Tensor) -> Tensor:
        return y.flatten(1).square().mean(1, keepdim=True).expand(-1, self.classes)


def can_be_counted(way: str) -> bool:
    """Return whether a way runs on fake tensors."""
    return not (WAYS[way].is_compiled or WAYS[way].is_for_gpu or WAYS[way].needs)


def count(way: str, module: nn.Module, workload: Workload, parts: int = 1) -> Counts:
    """Count bytes, multiply-adds and operations of a step, with the optimizer's state in place.

    Operations are those of forward and backward, without the optimizer's.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(module, mode)
    with mode:
        made = WAYS[way].make(fake, parts)
        x, y = workload.batch(workload.count_batch)
        step = partial(made.step, x, y)
        step()
        memory = count_memory(step, model=fake, optimizer=made.optimizer)
        with FlopCounterMode(display=False, custom_mapping=MORE_PRODUCTS) as flops:
            step()
        counts: Counts = {name: getattr(memory, name) for name in MEMORY}
        counts["macs"] = flops.get_total_flops() // 2
        if made.gradients is not None and made.optimizer is not None:
            made.optimizer.zero_grad()
            with counted_operations() as operations:
                made.gradients(x, y)
            counts["operations"] = operations.total
            counts["bytes_moved"] = operations.moved
    return counts


def fitting_parts(model: nn.Module, workload: Workload, activations: float) -> int:
    """Return the number of equal parts of a batch that keeps backpropagation within activations."""
    parts = 1
    while parts < workload.count_batch:
        counts = count("accumulation", model, workload, parts)
        if counts["activations"] <= activations:
            break
        parts *= 2
    return parts


def parts_when_timed(parts: int, batch: int) -> int:
    """Return into how many parts a batch is divided when time is measured.

    It may be smaller than the batch at which memory is counted. BN needs two samples in a part.

    Args:
        parts: of the batch at which memory is counted.
        batch: size of the batch at which time is measured.
    """
    return max(1, min(parts, batch // 2))


def limit(model: nn.Module, workload: Workload) -> Counts:
    """Count the step that a block-local one cannot be below: its heads cost nothing."""
    net: Any = WAYS["kept"].prepare(model, workload)
    for i in range(len(net.plan)):
        net.set_submodule(head_name(i), FreeHead(workload.classes))
    return count("kept", net, workload)


def largest_batch(way: str, module: nn.Module, workload: Workload, budget: int) -> dict[str, float]:
    """Find the largest batch that fits a budget from the peaks at two batches.

    A peak grows in proportion to the batch, so a line through two counts gives a first guess. It
    may miss by a sample or two.
    """

    def peak_at(size: int) -> float:
        return count(way, module, replace(workload, count_batch=size))["peak"]

    low, high = 32, 64
    peak_low = peak_at(low)
    peak_high = peak_at(high)
    fits = high + int((budget - peak_high) / ((peak_high - peak_low) / (high - low)))
    peak = peak_at(fits)
    while peak > budget:
        slope = (peak - peak_high) / (fits - high)
        fits = min(fits - 1, high + int((budget - peak_high) / slope))
        peak = peak_at(fits)
    return {str(low): peak_low, str(high): peak_high, "fits": fits, "peak": peak}
