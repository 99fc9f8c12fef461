"""What a GPU is needed for: the time of steps by events, memory, and launches by the profiler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import sffx
from tools.bench.parts import usable
from tools.bench.ways import WAYS, Candidate
from tools.bench.workloads import WORKLOADS, Workload, of_torchvision
from tools.timing import compare_time

WAYS_ON_GPU = (
    "BP",
    "checkpoint",
    "in backward",
    "checkpoint, in backward",
    "host memory",
    "eight bits",
    "local",
    "step",
    "mlp",
)
COMPILED_ON_GPU = ("BP, compiled", "local, compiled")

# Of the quick benchmark, which fits in eight minutes on one GPU.
QUICK = (
    of_torchvision("resnet18", 32, 10, 128, 128),
    of_torchvision("resnet50", 224, 1000, 64, 64),
    of_torchvision("mobilenet_v3_large", 224, 10, 64, 64),
    of_torchvision("vit_b_16", 224, 100, 64, 64),
)


def on_gpu(rounds: int, *, quick: bool) -> dict[str, Any]:
    """Measure the ways to train on a GPU: plain, and in the settings that users choose."""
    record: dict[str, Any] = {}
    for workload in QUICK if quick else WORKLOADS:
        record[workload.name] = {
            "float32": _compared(workload, WAYS_ON_GPU, rounds),
            "TF32": _compared(workload, ("BP", "local"), rounds, tf32=True),
            "bfloat16, channels-last": _compared(
                workload, ("BP", "local", "mlp"), rounds, low_precision=True
            ),
        }
        print(workload.name, json.dumps(record[workload.name]), flush=True)
    first = QUICK[0]
    record[f"{first.name}, compiled"] = _compared(first, ("BP", *COMPILED_ON_GPU), rounds)
    record["offload"] = offload(rounds)
    return record


def _compared(
    workload: Workload,
    ways: tuple[str, ...],
    rounds: int,
    *,
    tf32: bool = False,
    low_precision: bool = False,
) -> dict[str, Any]:
    """Return time, peak memory and launches of some ways; times are relative to BP."""
    model = workload.build()
    x, y = (tensor.cuda() for tensor in workload.batch(workload.time_batch))
    if low_precision and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    found: dict[str, Any] = {}
    steps = {}
    with _float32_products(tf32):
        for name in usable(ways):
            held = torch.cuda.memory_allocated()
            module = WAYS[name].prepare(model, workload).cuda()
            if low_precision:
                module = module.to(memory_format=torch.channels_last)
            made = WAYS[name].make(module, 1)
            step = partial(_run, made, x, y, low_precision)
            # What the models before hold does not count.
            found[name] = {"peak": peak_of(step) - held, "launches": launches_of(step)}
            steps[name] = step
        times = compare_time(steps, rounds=rounds, warmup=2, device="cuda")
    for name, own in found.items():
        own["time"] = times.paired_ratio(name, "BP")
        own["seconds"] = times.median(name)
    return found


def _run(made: Candidate, x: Tensor, y: Tensor, low_precision: bool) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=low_precision):
        made.step(x, y)


@contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    """Let products of float32 be made in TF32, or not."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    cudnn = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


def peak_of(step: Callable[[], object]) -> int:
    """Return the most bytes that the allocator holds in a third step, all models included.

    The first two steps make the state of the optimizer, and compile.
    """
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def launches_of(step: Callable[[], object]) -> int:
    """Return the number of kernels that a step launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kinds = (torch.autograd.DeviceType.CUDA,)
    return sum(event.count for event in profiled.key_averages() if event.device_type in kinds)


def offload(rounds: int) -> dict[str, Any]:
    """Time a step of an offloaded resnet50 beside one that is on the GPU."""
    workload = of_torchvision("resnet50", 224, 1000, 64, 64)
    model = workload.build()
    x, y = (tensor.cuda() for tensor in workload.batch(workload.time_batch))
    steps = {}
    peaks = {}
    for name in ("on the GPU", "offloaded"):
        net = sffx.transform(model, example_input=workload.example)
        if name == "on the GPU":
            net = net.cuda()
        optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3), 1e-3)
        if name == "offloaded":
            sffx.offload(net, optimizer, device="cuda")
        steps[name] = partial(sffx.local_step, net, x, y, optimizer)
        peaks[name] = peak_of(steps[name])
    times = compare_time(steps, rounds=rounds, warmup=2, device="cuda")
    return {"time": times.paired_ratio("offloaded", "on the GPU"), "peaks": peaks}
