"""Measure a training step by backpropagation and by sffx side by side: counted memory, counted arithmetic, time.

    python tools/bench.py --out tools/results/bench

Memory and arithmetic are counted on fake tensors at the large batch, nothing is computed; time is measured at the small batch, the ways
alternating in one run. AdamW, float32, default policy. The ways:

- BP: plain backpropagation;
- checkpoint: backpropagation with `torch.utils.checkpoint` around the same blocks, with the model's own layers;
- accumulation: backpropagation over as many smaller batches as bring its activations down to those of the local step;
- deferred: `sff_loss(net(x), y).backward()`; local: `local_loss(net, x, y).backward()`; step: `local_step(net, x, y, optimizer)`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sffx
from sffx.measure.memory import count_memory
from sffx.measure.timing import compare_time

Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Workload:
    """A model at a size, with the batch that memory is counted at and the one that time is measured at."""

    model: str
    size: int
    classes: int
    count_batch: int
    time_batch: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.size} x {self.size}, J = {self.classes}"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return getattr(torchvision.models, self.model)(num_classes=self.classes).train()


WORKLOADS = (
    Workload("resnet18", 32, 10, 128, 128),
    Workload("resnet18", 32, 100, 128, 128),
    Workload("resnet18", 224, 1000, 64, 16),
    Workload("resnet50", 224, 1000, 64, 16),
    Workload("mobilenet_v3_large", 224, 10, 64, 32),
    Workload("vit_b_16", 224, 100, 16, 8),
)
WAYS = ("BP", "checkpoint", "accumulation", "deferred", "local", "step")


@dataclass
class Candidate:
    """A way to train: what is trained, its optimizer, and the step on a batch."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step


def prepare(way: str, model: nn.Module, example: Tensor) -> nn.Module:
    """Return the model as a way trains it; the model itself is left alone."""
    if way in ("BP", "accumulation"):
        return copy.deepcopy(model)
    if way != "checkpoint":
        return sffx.transform(model, example_input=example)
    with mock.patch("sffx.compiler.rewrite.lean"):
        net = sffx.transform(model, example_input=example, norm="none")
    for i in range(len(net.plan)):
        net.set_submodule(f"head_{i}", nn.Identity())
    return net


def candidate(way: str, module: Any, parts: int = 1) -> Candidate:
    """Make the step of a way on a prepared module; `parts` is the number of smaller batches of "accumulation"."""
    is_cut = way in ("deferred", "local", "step")
    optimizer = torch.optim.AdamW(sffx.parameter_groups(module, lr=1e-3) if is_cut else module.parameters(), lr=1e-3)
    losses: dict[str, Step] = {
        "BP": lambda x, y: F.cross_entropy(module(x), y),
        "accumulation": lambda x, y: F.cross_entropy(module(x), y) / parts,
        "checkpoint": lambda x, y: F.cross_entropy(checkpointed(module, x), y),
        "deferred": lambda x, y: sffx.sff_loss(module(x), y),
        "local": lambda x, y: sffx.local_loss(module, x, y),
    }

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            losses[way](a, b).backward()  # type: ignore[attr-defined]
        optimizer.step()

    return Candidate(module, optimizer, step if way != "step" else lambda x, y: sffx.local_step(module, x, y, optimizer))


def checkpointed(net: Any, x: Tensor) -> Tensor:
    """Run the blocks of a net cut without norm as one model, each under a checkpoint."""
    values = {net.plan.inputs[0].name: x}
    for block in (*net.plan, net.plan.classifier):
        result = checkpoint(net.get_submodule(block.target), *(values[name] for name in block.inputs), use_reentrant=False)
        values.update(zip((block.output, *block.sides), result if block.sides else (result,), strict=True))
    return values[net.plan.classifier.output]


def count(way: str, module: nn.Module, workload: Workload, parts: int = 1) -> dict[str, float]:
    """Count bytes and multiply-adds of a step that has the optimizer's state in place, on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        fake = copy.deepcopy(module)
    with mode:
        made = candidate(way, fake, parts)
        x, y = batch(workload, workload.count_batch)
        made.step(x, y)
        memory = count_memory(lambda: made.step(x, y), model=fake, optimizer=made.optimizer)
        with FlopCounterMode(display=False) as flops:
            made.step(x, y)
    fields = ("parameters", "gradients", "optimizer_state", "optimizer_temporaries", "activations", "peak")
    return {**{name: getattr(memory, name) for name in fields}, "macs": flops.get_total_flops() // 2}


def batch(workload: Workload, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, workload.size, workload.size), torch.randint(0, workload.classes, (size,))


def fitting_parts(model: nn.Module, workload: Workload, activations: float) -> int:
    """Return into how few equal parts a batch must be split for backpropagation to need no more activations than given."""
    parts = 1
    while parts < workload.count_batch and count("accumulation", model, workload, parts)["activations"] > activations:
        parts *= 2
    return parts


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    model = workload.build()
    example = torch.zeros(1, 3, workload.size, workload.size)
    modules = {way: prepare(way, model, example) for way in WAYS}
    counts = {way: count(way, modules[way], workload) for way in WAYS if way != "accumulation"}
    parts = fitting_parts(model, workload, counts["local"]["activations"])
    counts["accumulation"] = count("accumulation", modules["accumulation"], workload, parts)
    record: dict[str, Any] = {"name": workload.name, "batch": workload.count_batch, "parts": parts, "counts": counts}
    if rounds:
        x, y = batch(workload, workload.time_batch)
        steps = {}
        for way in WAYS:
            made = candidate(way, modules[way], min(parts, workload.time_batch // 2) if way == "accumulation" else 1)
            steps[way] = partial(made.step, x, y)
        times = compare_time(steps, rounds=rounds, warmup=1)
        record |= {"time_batch": workload.time_batch, "time": {way: times.paired_ratio(way, "BP") for way in WAYS}}
        record["seconds"] = {way: times.median(way) for way in WAYS}
    print(table(record), flush=True)
    return record


def table(record: dict[str, Any]) -> str:
    """Render one workload as a table; everything but the bytes is relative to BP."""
    base = record["counts"]["BP"]
    lines = [
        f"### {record['name']} (memory at batch {record['batch']}, time at {record.get('time_batch', '–')})",
        "",
        "| way | time | peak | activations | multiply-adds | peak, MiB | activations, MiB | gradients, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        found = record["counts"][way]
        ratios = [found[key] / base[key] for key in ("peak", "activations", "macs")]
        mib = [found[key] / 2**20 for key in ("peak", "activations", "gradients")]
        time = f"{record['time'][way]:.2f}" if "time" in record else "–"
        name = f"{way} ({record['parts']} parts)" if way == "accumulation" else way
        lines.append(f"| {name} | {time} | {' | '.join(f'{r:.2f}' for r in ratios)} | {' | '.join(f'{m:.1f}' for m in mib)} |")
    fixed = {key: base[key] / 2**20 for key in ("parameters", "optimizer_state")}
    lines += ["", f"BP holds {fixed['parameters']:.1f} MiB of parameters and {fixed['optimizer_state']:.1f} MiB of optimizer state.", ""]
    return "\n".join(lines)


def depth() -> dict[str, Any]:
    """Count activations against depth: bottleneck ResNets of 50 to 1,001 layers, 224 x 224, batch 16."""
    record = {}
    for layers, blocks in {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 1001: (3, 94, 233, 3)}.items():
        workload = Workload("resnet", 224, 1000, 16, 0)
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, blocks).train()
        example = torch.zeros(1, 3, 224, 224)
        ways = ("BP", "checkpoint", "local")
        record[layers] = {way: count(way, prepare(way, model, example), workload)["activations"] for way in ways}
        print(f"depth {layers}: " + ", ".join(f"{way} {value / 2**20:.0f} MiB" for way, value in record[layers].items()), flush=True)
    return record


def classes(rounds: int) -> dict[str, Any]:
    """Compare resnet18 at many classes with itself at 1,000, 224 x 224: memory at batch 64, time at 16."""
    record: dict[str, Any] = {}
    steps = {}
    for j in (10, 100, 1000, 21_841):
        workload = Workload("resnet18", 224, j, 64, 16)
        net = prepare("local", workload.build(), torch.zeros(1, 3, 224, 224))
        record[j] = count("local", net, workload)
        if rounds:
            x, y = batch(workload, workload.time_batch)
            steps[str(j)] = partial(candidate("local", net).step, x, y)
    if rounds:
        times = compare_time(steps, rounds=rounds, warmup=1)
        for j in record:
            record[j]["time"] = times.paired_ratio(str(j), "1000")
    for j, found in record.items():
        ratio = found["peak"] / record[1000]["peak"]
        print(
            f"J = {j}: peak {found['peak'] / 2**20:.0f} MiB, {ratio:.2f} of J = 1000; time {found.get('time', float('nan')):.2f}",
            flush=True,
        )
    return record


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw activations against depth and against the number of classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in ("BP", "checkpoint", "local"):
        left.plot([int(d) for d in record["depth"]], [found[way] / 2**20 for found in record["depth"].values()], marker="o", label=way)
    left.set(xlabel="layers of a bottleneck ResNet", ylabel="activations, MiB (224 x 224, batch 16)", xscale="log", yscale="log")
    left.legend(frameon=False)
    peaks = [found["peak"] / 2**20 for found in record["classes"].values()]
    right.plot([int(j) for j in record["classes"]], peaks, marker="o")
    right.set(xlabel="classes", ylabel="peak of a local step, MiB (resnet18, batch 64)", xscale="log", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tools/results/bench"))
    parser.add_argument("--rounds", type=int, default=8, help="of each time measurement; 0 only counts")
    parser.add_argument("--only", help="a part of the names of the workloads to measure, leaving out depth and classes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [workload for workload in WORKLOADS if (args.only or "") in workload.name]
    record: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "workloads": [measure(workload, args.rounds) for workload in chosen],
    }
    if not args.only:
        record |= {"depth": depth(), "classes": classes(args.rounds)}
        plot(record, args.out / "scaling.png")
    (args.out / "record.json").write_text(json.dumps(record, indent=1))
    head = f"{record['date']}, {record['hardware']}, AdamW, float32. Time, peak, activations and multiply-adds are relative to BP.\n\n"
    (args.out / "table.md").write_text(head + "\n".join(map(table, record["workloads"])))


if __name__ == "__main__":
    main()
