"""The parts of the record that are measured on the CPU or counted."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

import sffx
import sffx.runtime.learn
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage
from sffx.tables import GIB, MIB
from tools.bench.counting import (
    can_be_counted,
    count,
    fitting_parts,
    largest_batch,
    limit,
    parts_when_timed,
)
from tools.bench.page import table
from tools.bench.ways import WAYS, Step
from tools.bench.workloads import SMALL, WORKLOADS, Workload, of_torchvision
from tools.timing import compare_time

# The ways that are timed where none is named: those that compile would take minutes.
TIMED = tuple(name for name, way in WAYS.items() if not (way.is_compiled or way.is_for_gpu))


def usable(ways: Sequence[str]) -> list[str]:
    """Return the ways whose packages are installed."""
    return [way for way in ways if not WAYS[way].needs or find_spec(WAYS[way].needs)]


def measure(workload: Workload, rounds: int, timed: Sequence[str] = TIMED) -> dict[str, Any]:
    """Count, and with `rounds` time, every way to train a workload."""
    model = workload.build()
    modules = {}
    for name in usable(tuple(WAYS)):
        if can_be_counted(name) or name in timed:
            modules[name] = WAYS[name].prepare(model, workload)
    counts = {}
    for name, module in modules.items():
        if can_be_counted(name) and name != "accumulation":
            counts[name] = count(name, module, workload)
    parts = fitting_parts(model, workload, counts["local"]["activations"])
    counts["accumulation"] = count("accumulation", modules["accumulation"], workload, parts)
    record: dict[str, Any] = {
        "name": workload.name,
        "batch": workload.count_batch,
        "parts": parts,
        "counts": counts,
        "limit": limit(model, workload),
    }
    if rounds:
        time_parts = parts_when_timed(parts, workload.time_batch)
        x, y = workload.batch(workload.time_batch)
        steps: dict[str, Callable[[], object]] = {}
        for name in usable(timed):
            made = WAYS[name].make(modules[name], time_parts if name == "accumulation" else 1)
            steps[name] = partial(made.step, x, y)
        # A net that sffx compiled does so in its second step.
        times = compare_time(steps, rounds=rounds, warmup=2)
        record["time_batch"] = workload.time_batch
        record["time"] = {name: times.paired_ratio(name, "BP") for name in steps}
        record["seconds"] = {name: times.median(name) for name in steps}
    print(table(record), flush=True)
    return record


def depth() -> dict[int, Any]:
    """Count activations of bottleneck ResNets of 50 to 1,001 layers, 224 x 224, batch 16."""
    layers_and_blocks = {
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        1001: (3, 94, 233, 3),
    }
    record = {}
    for layers, blocks in layers_and_blocks.items():
        make = partial(_bottlenecks, blocks)
        workload = Workload(f"resnet{layers}", make, (3, 224, 224), 1000, 16, 0)
        model = workload.build()
        activations = {}
        for way in ("BP", "checkpoint", "local"):
            module = WAYS[way].prepare(model, workload)
            activations[way] = count(way, module, workload)["activations"]
        record[layers] = activations
        shown = [f"{way} {value / MIB:.0f} MiB" for way, value in activations.items()]
        print(f"depth {layers}: {', '.join(shown)}", flush=True)
    return record


def _bottlenecks(blocks: Sequence[int], classes: int) -> nn.Module:
    bottleneck = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(bottleneck, list(blocks), num_classes=classes)


def classes(rounds: int) -> dict[int, dict[str, Any]]:
    """Compare resnet18 at many classes with itself at 1,000, 224 x 224.

    Memory is counted at batch 64, time is measured at 16.
    """
    record: dict[int, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for j in (10, 100, 1000, 21_841):
        workload = of_torchvision("resnet18", 224, j, 64, 16)
        net = WAYS["local"].prepare(workload.build(), workload)
        record[j] = count("local", net, workload)
        if rounds:
            x, y = workload.batch(workload.time_batch)
            steps[str(j)] = partial(WAYS["local"].make(net, 1).step, x, y)
    if rounds:
        times = compare_time(steps, rounds=rounds, warmup=1)
        for j in record:
            record[j]["time"] = times.paired_ratio(str(j), "1000")
    for j, counts in record.items():
        peak = f"peak {counts['peak'] / MIB:.0f} MiB"
        ratio = counts["peak"] / record[1000]["peak"]
        seconds = f"time {counts.get('time', math.nan):.2f}"
        print(f"J = {j}: {peak}, {ratio:.2f} of J = 1000; {seconds}", flush=True)
    return record


def batches(budget: int = 8 * GIB) -> dict[str, Any]:
    """Find the largest batch that fits a budget, for the workloads of 224 x 224."""
    record: dict[str, Any] = {}
    for workload in WORKLOADS[2:]:
        model = workload.build()
        record[workload.name] = {}
        for way in ("BP", "checkpoint", "local", "step"):
            module = WAYS[way].prepare(model, workload)
            result = largest_batch(way, module, workload, budget)
            record[workload.name][way] = result
            counted = f"counted: {result['peak'] / GIB:.2f}"
            fits = f"batch {result['fits']} fits {budget / GIB:.0f} GiB ({counted})"
            print(f"{workload.name}, {way}: {fits}", flush=True)
    return record


class Spent:
    """Adds up the seconds that some functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def overhead(repeats: int = 3) -> dict[str, Any]:
    """Measure the share of the outer loop in a block-local step of resnet152, 224 x 224, batch 4.

    It is the time that is not spent in blocks, heads, norms, losses and gradients.
    """
    workload = of_torchvision("resnet152", 224, 1000, 4, 4)
    net: Any = WAYS["local"].prepare(workload.build(), workload)
    x, y = workload.batch(4)
    spent = Spent()
    shares = []
    with ExitStack() as patches:
        for owner, name in (
            (sffx.runtime.learn, "block_loss"),
            (Residency, "gradients"),
            (Stage, "_run"),
        ):
            timed = spent.timed(getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, timed))
        for _ in range(repeats + 1):
            spent.seconds = 0.0
            start = time.perf_counter()
            sffx.local_loss(net, x, y)
            shares.append(1 - spent.seconds / (time.perf_counter() - start))
    share = statistics.median(shares[1:])  # the first is a warm-up
    blocks = len(net.plan)
    print(f"overhead of the outer loop, resnet152 ({blocks} blocks): {share:.2%} of a step")
    return {"share": share, "blocks": blocks}


def settings(rounds: int) -> dict[str, Any]:
    """Time BP and local on resnet18, 224 x 224, J = 10, batch 8, in three settings.

    They are plain, under bfloat16 autocast, and channels-last.
    """
    workload = of_torchvision("resnet18", 224, 10, 8, 8)
    model = workload.build()
    x, y = workload.batch(8)
    channels_last = x.to(memory_format=torch.channels_last)
    steps: dict[str, Callable[[], object]] = {}
    for name in ("BP", "local"):
        way = WAYS[name]
        plain = way.make(way.prepare(model, workload), 1)
        steps[name] = partial(plain.step, x, y)
        steps[f"{name}, bfloat16"] = partial(under_autocast, plain.step, x, y)
        module = way.prepare(model, workload).to(memory_format=torch.channels_last)
        steps[f"{name}, channels-last"] = partial(way.make(module, 1).step, channels_last, y)
    times = compare_time(steps, rounds=rounds, warmup=1)
    record = {"time": {name: times.paired_ratio(name, "BP") for name in steps}}
    print(json.dumps(record), flush=True)
    return record


def under_autocast(step: Step, x: Tensor, y: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        step(x, y)


COMPILED = ("BP", "local", "BP, compiled", "local, compiled", "budget, compiled")


def compiled(rounds: int) -> dict[str, Any]:
    """Time compiled steps of two small workloads, and the seconds until they are compiled.

    The seconds are those of the first two steps: a net that sffx compiled does so in the second.
    """
    record: dict[str, Any] = {}
    for workload in (
        of_torchvision("resnet18", 32, 10, 128, 128),
        of_torchvision("mobilenet_v3_small", 64, 10, 128, 64),
    ):
        model = workload.build()
        x, y = workload.batch(workload.time_batch)
        steps: dict[str, Callable[[], object]] = {}
        seconds = {}
        for name in COMPILED:
            # Every way compiles anew: nothing is left of another one or of an earlier run.
            torch.compiler.reset()
            with fresh_cache():
                way = WAYS[name]
                steps[name] = partial(way.make(way.prepare(model, workload), 1).step, x, y)
                start = time.perf_counter()
                for _ in range(2):
                    steps[name]()
                seconds[name] = time.perf_counter() - start
        times = compare_time(steps, rounds=rounds, warmup=1)
        ratios = {name: times.paired_ratio(name, "BP, compiled") for name in steps}
        record[workload.name] = {"time": ratios, "seconds_of_two_steps": seconds}
        print(workload.name, json.dumps(record[workload.name]), flush=True)
    return record


def fresh_cache() -> Any:
    """Return a context in which inductor compiles everything anew."""
    from torch._inductor.utils import fresh_inductor_cache

    return fresh_inductor_cache()


def small(rounds: int) -> dict[str, Any]:
    """Count and time the small networks."""
    record = {}
    for workload in SMALL:
        record[workload.name] = measure(workload, rounds, ("BP", "in backward", "local", "step"))
    return record


def family(rounds: int) -> dict[str, Any]:
    """Time a step of supervised Forward-Forward beside one of SFF and of BP, on small networks."""
    record = {}
    for workload in SMALL[:3]:
        model = workload.build()
        x, y = workload.batch(workload.time_batch)
        steps: dict[str, Callable[[], object]] = {}
        counts = {}
        for name in ("sff", "ff"):
            net = sffx.transform(model, workload.policy, workload.example, objective=name)
            steps[name] = partial(WAYS["local"].make(net, 1).step, x, y)
            counts[name] = count("local", net, workload)
        times = compare_time(steps, rounds=rounds, warmup=1)
        record[workload.name] = {
            "time": times.paired_ratio("ff", "sff"),
            "macs": counts["ff"]["macs"] / counts["sff"]["macs"],
            "peak": counts["ff"]["peak"] / counts["sff"]["peak"],
        }
        print(workload.name, json.dumps(record[workload.name]), flush=True)
    return record
