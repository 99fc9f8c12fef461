"""Measure a training step by backpropagation and by sffx: memory, arithmetic and time.

    python -m tools.bench --out tools/results/bench

Memory and arithmetic are counted on fake tensors at the large batch; nothing is computed. Time is
measured at the small batch, the ways to train alternating in one run. AdamW, float32, default
policy. The ways:

- BP: plain backpropagation;
- checkpoint: backpropagation with `torch.utils.checkpoint` around the same blocks, with the model's
  own layers;
- accumulation: backpropagation over as many smaller batches as bring its activations down to those
  of the local step;
- deferred: `sff_loss(net(x), y).backward()`;
- local: `local_loss(net, x, y).backward()`;
- step: `local_step(net, x, y, optimizer)`;
- kept: local, with `recompute=False`;
- mlp: local, with `goodness="mlp"`.

Operations are those that forward and backward dispatch, views left out: a proxy for the launches on
a GPU. Bytes are what they read and write, a proxy for the time of a step that memory limits. The
optimizer is left out of both (`tools.operations` says where they come from).

The limit of the multiply-adds is the part that a block-local step cannot do without: the forward
pass, the gradients of the weights, and those of the values inside the blocks. Heads are left aside.

Beyond the workloads there are:

- depth: activations of ResNets of 50 to 1,001 layers;
- classes: 10 to 21,841 classes;
- batch: peaks, and the largest batch that fits a budget;
- overhead: the outer loop's share of a step of resnet152;
- settings: bfloat16 autocast, channels-last, `torch.compile`.

`--parts` chooses among them. A part that was measured before stays in the record. On a machine with
a GPU, `--device cuda` measures time there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sffx
import sffx.runtime.learn
from sffx.compiler.fake import fake_copy
from sffx.files import write
from sffx.memory.count import count_memory
from sffx.parts import head_name
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage
from sffx.tables import GIB, MIB
from tools.operations import counted_operations
from tools.timing import compare_time

Step = Callable[[Tensor, Tensor], object]
Counts = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """A model at a size.

    Attributes:
        model: its name in torchvision.
        size: height and width of an image.
        classes: J.
        count_batch: the batch size at which memory is counted.
        time_batch: the batch size at which time is measured.
    """

    model: str
    size: int
    classes: int
    count_batch: int
    time_batch: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.size} x {self.size}, J = {self.classes}"

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, 3, self.size, self.size)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return getattr(torchvision.models, self.model)(num_classes=self.classes).train()

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Draw images and labels."""
        images = torch.randn(size, 3, self.size, self.size)
        return images, torch.randint(0, self.classes, (size,))


WORKLOADS = (
    Workload("resnet18", 32, 10, 128, 128),
    Workload("resnet18", 32, 100, 128, 128),
    Workload("resnet18", 224, 1000, 64, 16),
    Workload("resnet50", 224, 1000, 64, 16),
    Workload("mobilenet_v3_large", 224, 10, 64, 32),
    Workload("vit_b_16", 224, 100, 16, 8),
)
WAYS = ("BP", "checkpoint", "accumulation", "deferred", "local", "step", "kept", "mlp")
PARTS = ("workloads", "depth", "classes", "batch", "overhead", "settings")

# The arguments of `transform` for a way.
OPTIONS: dict[str, dict[str, Any]] = {
    "kept": {"recompute": False},
    "mlp": {"goodness": "mlp"},
}

COUNTED = (
    "parameters",
    "gradients",
    "optimizer_state",
    "optimizer_temporaries",
    "activations",
    "peak",
)


def _product(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]


# The in-place forms of products, which torch's counter does not know.
IN_PLACE_PRODUCTS = {
    torch.ops.aten.addmm_: _product,
    torch.ops.aten.addbmm_: _product,
}


@dataclass
class Candidate:
    """A way to train: a model, its optimizer, and the step on a batch.

    Attributes:
        module: that is trained.
        optimizer: over its parameters.
        step: with the optimizer.
        gradients: forward and backward of the step; None where the optimizer steps in between.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    gradients: Step | None = None


# The ways to train


def prepare(way: str, model: nn.Module, example: Tensor) -> nn.Module:
    """Return the model as a way trains it. The model itself is left alone."""
    if way in ("BP", "accumulation"):
        return copy.deepcopy(model)
    if way != "checkpoint":
        return sffx.transform(model, example_input=example, **OPTIONS.get(way, {}))
    # The rival gets the same blocks, but the model's own layers, and no heads.
    with mock.patch("sffx.api.save_memory"):
        net = sffx.transform(model, example_input=example, norm="none")
    for i in range(len(net.plan)):
        net.set_submodule(head_name(i), nn.Identity())
    return net


def candidate(way: str, module: Any, parts: int = 1) -> Candidate:
    """Make the step of a way on a prepared module.

    Args:
        way: one of `WAYS`.
        module: as `prepare` returned it.
        parts: number of smaller batches of a step, for "accumulation".
    """
    is_cut = way not in ("BP", "checkpoint", "accumulation")
    parameters = sffx.parameter_groups(module, lr=1e-3) if is_cut else module.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    if way == "step":
        return Candidate(module, optimizer, lambda x, y: sffx.local_step(module, x, y, optimizer))

    def gradients(x: Tensor, y: Tensor) -> None:
        for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = loss_of(way, module, some_x, some_y)
            if parts > 1:
                loss = loss / parts
            loss.backward()

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        gradients(x, y)
        optimizer.step()

    return Candidate(module, optimizer, step, gradients)


def loss_of(way: str, module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a batch by a way."""
    if way in ("BP", "accumulation"):
        return F.cross_entropy(module(x), y)
    if way == "checkpoint":
        return F.cross_entropy(checkpointed(module, x), y)
    if way == "deferred":
        return sffx.sff_loss(module(x), y)
    return sffx.local_loss(module, x, y)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    """Run the blocks of a net cut without norm as one model, each under a checkpoint."""
    values = {net.plan.inputs[0].name: x}
    for block in net.plan.all_blocks:
        module = net.get_submodule(block.target)
        arguments = [values[name] for name in block.inputs]
        results = checkpoint(module, *arguments, use_reentrant=False)
        if not block.sides:
            results = (results,)
        values.update(zip((block.output, *block.sides), results, strict=True))
    return values[net.plan.classifier.output]


class FreeHead(nn.Module):
    """A head without products: the mean square of a block's output, the same for every class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, y: Tensor) -> Tensor:
        return y.flatten(1).square().mean(1, keepdim=True).expand(-1, self.classes)


# Counting


def count(way: str, module: nn.Module, workload: Workload, parts: int = 1) -> Counts:
    """Count bytes and multiply-adds of a step on fake tensors, the optimizer's state in place."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(module, mode)
    with mode:
        made = candidate(way, fake, parts)
        x, y = workload.batch(workload.count_batch)
        step = partial(made.step, x, y)
        step()
        memory = count_memory(step, model=fake, optimizer=made.optimizer)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE_PRODUCTS) as flops:
            step()
        counts: Counts = {name: getattr(memory, name) for name in COUNTED}
        counts["macs"] = flops.get_total_flops() // 2
        if made.gradients is not None:
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


def limit(model: nn.Module, workload: Workload) -> float:
    """Count the multiply-adds of a block-local step whose heads cost nothing."""
    net: Any = prepare("kept", model, workload.example)
    for i in range(len(net.plan)):
        net.set_submodule(head_name(i), FreeHead(workload.classes))
    return count("kept", net, workload)["macs"]


# The parts of the record


def measure(
    workload: Workload, rounds: int, device: str, timed: tuple[str, ...] = WAYS
) -> dict[str, Any]:
    """Count, and with `rounds` time, every way to train a workload."""
    model = workload.build()
    modules = {way: prepare(way, model, workload.example) for way in WAYS}
    counts = {}
    for way in WAYS:
        if way != "accumulation":
            counts[way] = count(way, modules[way], workload)
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
        time_parts = min(parts, workload.time_batch // 2)
        steps = _steps(workload, modules, timed, time_parts, device)
        record |= _times(workload, steps, rounds, device)
    print(table(record), flush=True)
    return record


def _steps(
    workload: Workload,
    modules: dict[str, nn.Module],
    timed: tuple[str, ...],
    parts: int,
    device: str,
) -> dict[str, Callable[[], object]]:
    x, y = (tensor.to(device) for tensor in workload.batch(workload.time_batch))
    steps: dict[str, Callable[[], object]] = {}
    for way in timed:
        module = modules[way].to(device)
        made = candidate(way, module, parts if way == "accumulation" else 1)
        steps[way] = partial(made.step, x, y)
    return steps


def _times(
    workload: Workload, steps: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, Any]:
    record: dict[str, Any] = {"time_batch": workload.time_batch}
    if device == "cuda":
        record["max_memory_allocated"] = {way: allocated(step) for way, step in steps.items()}
    times = compare_time(steps, rounds=rounds, warmup=1, device=device)
    record["time"] = {way: times.paired_ratio(way, "BP") for way in steps}
    record["seconds"] = {way: times.median(way) for way in steps}
    return record


def allocated(step: Callable[[], object]) -> int:
    """Return the most bytes that the GPU's allocator held in a second step.

    All models of the workload are on the GPU, and are included.
    """
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def depth() -> dict[str, Any]:
    """Count activations of bottleneck ResNets of 50 to 1,001 layers, 224 x 224, batch 16."""
    layers_and_blocks = {
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        1001: (3, 94, 233, 3),
    }
    workload = Workload("resnet", 224, 1000, 16, 0)
    record = {}
    for layers, blocks in layers_and_blocks.items():
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, blocks).train()
        activations = {}
        for way in ("BP", "checkpoint", "local"):
            module = prepare(way, model, workload.example)
            activations[way] = count(way, module, workload)["activations"]
        record[layers] = activations
        shown = [f"{way} {value / MIB:.0f} MiB" for way, value in activations.items()]
        print(f"depth {layers}: {', '.join(shown)}", flush=True)
    return record


def classes(rounds: int) -> dict[str, Any]:
    """Compare resnet18 at many classes with itself at 1,000, 224 x 224.

    Memory is counted at batch 64, time is measured at 16.
    """
    record: dict[str, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    for j in (10, 100, 1000, 21_841):
        workload = Workload("resnet18", 224, j, 64, 16)
        net = prepare("local", workload.build(), workload.example)
        record[j] = count("local", net, workload)
        if rounds:
            x, y = workload.batch(workload.time_batch)
            steps[str(j)] = partial(candidate("local", net).step, x, y)
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
            module = prepare(way, model, workload.example)
            result = largest_batch(way, module, workload, budget)
            record[workload.name][way] = result
            counted = f"counted: {result['peak'] / GIB:.2f}"
            fits = f"batch {result['fits']} fits {budget / GIB:.0f} GiB ({counted})"
            print(f"{workload.name}, {way}: {fits}", flush=True)
    return record


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
    workload = Workload("resnet152", 224, 1000, 4, 4)
    net: Any = prepare("local", workload.build(), workload.example)
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


def settings(rounds: int, device: str) -> dict[str, Any]:
    """Time BP and local on resnet18, 224 x 224, J = 10, batch 8, in four settings.

    They are plain, under bfloat16 autocast, channels-last, and compiled.
    """
    workload = Workload("resnet18", 224, 10, 8, 8)
    model = workload.build()
    x, y = (tensor.to(device) for tensor in workload.batch(8))
    channels_last = x.to(memory_format=torch.channels_last)
    record: dict[str, Any] = {"compile_seconds": {}}
    steps: dict[str, Callable[[], object]] = {}
    for way in ("BP", "local"):
        plain = candidate(way, prepare(way, model, workload.example).to(device))
        steps[way] = partial(plain.step, x, y)
        steps[f"{way}, bfloat16"] = partial(under_autocast, plain.step, x, y)
        module = prepare(way, model, workload.example)
        module = module.to(device, memory_format=torch.channels_last)
        steps[f"{way}, channels-last"] = partial(candidate(way, module).step, channels_last, y)
        compiled = prepare(way, model, workload.example).to(device)
        compile_parts(compiled, way)
        step = partial(candidate(way, compiled).step, x, y)
        start = time.perf_counter()
        step()
        record["compile_seconds"][way] = time.perf_counter() - start
        steps[f"{way}, compiled"] = step
    times = compare_time(steps, rounds=rounds, warmup=1, device=device)
    record["time"] = {name: times.paired_ratio(name, "BP") for name in steps}
    print(json.dumps(record), flush=True)
    return record


def compile_parts(module: Any, way: str) -> None:
    """Compile a plain model as a whole, and a cut one block by block."""
    if way == "BP":
        module.compile()
        return
    for block in module.plan:
        module.get_submodule(block.target).compile()


def under_autocast(step: Step, x: Tensor, y: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        step(x, y)


# The page


def table(record: dict[str, Any]) -> str:
    """Return one workload as a table. Everything but the bytes is relative to BP."""
    base = record["counts"]["BP"]
    batches = f"memory at batch {record['batch']}, time at {record.get('time_batch', '–')}"
    absolute = "peak, MiB | activations, MiB | gradients, MiB"
    lines = [
        f"### {record['name']} ({batches})",
        "",
        f"| way | time | peak | activations | multiply-adds | operations | bytes | {absolute} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        if way in record["counts"]:
            lines.append(_row(way, record))
    limit_of_bp = record["limit"] / base["macs"]
    parameters = base["parameters"] / MIB
    state = base["optimizer_state"] / MIB
    lines += [
        "",
        f"The limit of the multiply-adds, heads left aside, is {limit_of_bp:.2f} of BP's.",
        f"BP holds {parameters:.1f} MiB of parameters and {state:.1f} MiB of optimizer state.",
        "",
    ]
    return "\n".join(lines)


def _row(way: str, record: dict[str, Any]) -> str:
    base = record["counts"]["BP"]
    counts = record["counts"][way]
    name = f"{way} ({record['parts']} parts)" if way == "accumulation" else way
    times = record.get("time", {})
    cells = [name, f"{times[way]:.2f}" if way in times else "–"]
    for key in ("peak", "activations", "macs", "operations", "bytes_moved"):
        # A record from before operations were counted has none.
        is_counted = key in counts and key in base
        cells.append(f"{counts[key] / base[key]:.2f}" if is_counted else "–")
    for key in ("peak", "activations", "gradients"):
        cells.append(f"{counts[key] / MIB:.1f}")
    return f"| {' | '.join(cells)} |"


def report(record: dict[str, Any]) -> str:
    """Return the record as a page."""
    lines = ["AdamW, float32. Time, peak, activations and multiply-adds are relative to BP.", ""]
    for workload in record.get("workloads", {}).values():
        lines += [table(workload), f"{workload['date']}, {workload['hardware']}.", ""]
    for name in PARTS[1:]:
        if name not in record:
            continue
        part = record[name]
        text = json.dumps(part["found"], indent=1)
        stamp = f"{part['date']}, {part['hardware']}:"
        lines += [f"### {name}", "", stamp, "", "```", text, "```", ""]
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw activations over depth, the peak over classes, and the largest batch of each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plot_depth(left, record["depth"]["found"])
    plot_classes(middle, record["classes"]["found"])
    plot_batches(right, record["batch"]["found"])
    figure.savefig(path, dpi=120)


def plot_depth(axes: Any, by_depth: dict[str, Any]) -> None:
    layers = [int(each) for each in by_depth]
    for way in ("BP", "checkpoint", "local"):
        activations = [counts[way] / MIB for counts in by_depth.values()]
        axes.plot(layers, activations, marker="o", label=way)
    axes.set(
        xlabel="layers of a bottleneck ResNet",
        ylabel="activations, MiB (224 x 224, batch 16)",
        xscale="log",
        yscale="log",
    )
    axes.legend(frameon=False)


def plot_classes(axes: Any, by_classes: dict[str, Any]) -> None:
    peaks = [counts["peak"] / MIB for counts in by_classes.values()]
    axes.plot([int(j) for j in by_classes], peaks, marker="o")
    axes.set(
        xlabel="classes",
        ylabel="peak of a local step, MiB (resnet18, batch 64)",
        xscale="log",
        ylim=(0, None),
    )


def plot_batches(axes: Any, by_workload: dict[str, Any]) -> None:
    width = 0.2
    for i, way in enumerate(("BP", "checkpoint", "local", "step")):
        places = [j + width * i - 0.3 for j in range(len(by_workload))]
        fits = [ways[way]["fits"] for ways in by_workload.values()]
        axes.bar(places, fits, width, label=way)
    names = [name.split(",")[0] for name in by_workload]
    axes.set(
        ylabel="largest batch in 8 GiB (224 x 224)", xticks=range(len(names)), xticklabels=names
    )
    axes.tick_params(axis="x", labelrotation=15)
    axes.legend(frameon=False)


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record, or leave the old one."""
    write(path, json.dumps(record, indent=1).encode())


def main() -> None:
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "record.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    measurements: dict[str, Callable[[], Any]] = {
        "depth": depth,
        "classes": partial(classes, args.rounds),
        "batch": batches,
        "overhead": overhead,
        "settings": partial(settings, args.rounds, args.device),
    }
    stamp = {"date": str(date.today()), "hardware": hardware(args.device)}
    for part in args.parts:
        if part != "workloads":
            record[part] = {**stamp, "found": measurements[part]()}
            save(record, path)
            continue
        for workload in WORKLOADS:
            if args.only in workload.name:
                measured = measure(workload, args.rounds, args.device, tuple(args.time))
                record.setdefault("workloads", {})[workload.name] = {**stamp, **measured}
                save(record, path)
    if {"depth", "classes", "batch"} <= set(record):
        plot(record, args.out / "scaling.png")
    (args.out / "table.md").write_text(report(record))


def hardware(device: str) -> str:
    """Return where time is measured, and the version of torch."""
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/bench"))
    parser.add_argument(
        "--rounds", type=int, default=8, help="of each time measurement; 0 only counts"
    )
    parser.add_argument(
        "--only", default="", help="a part of the names of the workloads to measure"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--time",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        help="the ways that are timed, BP among them",
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where time is measured"
    )
    return parser


if __name__ == "__main__":
    main()
