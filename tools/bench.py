"""Measure a training step by backpropagation and by sffx side by side: counted memory, counted arithmetic, time.

    python -m tools.bench --out tools/results/bench

Memory and arithmetic are counted on fake tensors at the large batch, nothing is computed; time is measured at the small batch, the ways
alternating in one run. AdamW, float32, default policy. The ways:

- BP: plain backpropagation;
- checkpoint: backpropagation with `torch.utils.checkpoint` around the same blocks, with the model's own layers;
- accumulation: backpropagation over as many smaller batches as bring its activations down to those of the local step;
- deferred: `sff_loss(net(x), y).backward()`; local: `local_loss(net, x, y).backward()`; step: `local_step(net, x, y, optimizer)`;
- kept: local, with `recompute=False`;
  mlp: local, with `goodness="mlp"`.

The limit of the multiply-adds is what a block-local step cannot do without: the forward pass, the gradients of the weights, and those of
the values inside the blocks; heads left aside.

Beyond the workloads: depth (activations of ResNets of 50 to 1,001 layers), classes (10 to 21,841), batch (peaks, and the largest batch that
fits a budget), overhead (the outer loop's share of a step of resnet152), settings (bfloat16 autocast, channels-last, `torch.compile`).
`--parts` chooses among them; a part that was measured before stays in the record. On a machine with a GPU, `--device cuda` times there.
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
import sffx.runtime.step as local
from sffx.compiler.fake import fake_copy
from sffx.files import write
from sffx.memory.count import count_memory
from tools.timing import compare_time

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
WAYS = ("BP", "checkpoint", "accumulation", "deferred", "local", "step", "kept", "mlp")
PARTS = ("workloads", "depth", "classes", "batch", "overhead", "settings")
OPTIONS: dict[str, dict[str, Any]] = {
    "kept": {"recompute": False},
    "mlp": {"goodness": "mlp"},
}

# The in-place forms of products, which torch's counter does not know.
IN_PLACE_PRODUCTS = {
    torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * math.prod(a) * b[-1],
    torch.ops.aten.addbmm_: lambda total, a, b, *_, **__: 2 * math.prod(a) * b[-1],
}


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
        return sffx.transform(model, example_input=example, **OPTIONS.get(way, {}))
    with mock.patch("sffx.api.save_memory"):
        net = sffx.transform(model, example_input=example, norm="none")
    for i in range(len(net.plan)):
        net.set_submodule(f"head_{i}", nn.Identity())
    return net


def candidate(way: str, module: Any, parts: int = 1) -> Candidate:
    """Make the step of a way on a prepared module; `parts` is the number of smaller batches of "accumulation"."""
    is_cut = way not in ("BP", "checkpoint", "accumulation")
    optimizer = torch.optim.AdamW(
        sffx.parameter_groups(module, lr=1e-3) if is_cut else module.parameters(), lr=1e-3
    )
    losses: dict[str, Step] = {
        "BP": lambda x, y: F.cross_entropy(module(x), y),
        "accumulation": lambda x, y: F.cross_entropy(module(x), y) / parts,
        "checkpoint": lambda x, y: F.cross_entropy(checkpointed(module, x), y),
        "deferred": lambda x, y: sffx.sff_loss(module(x), y),
        **dict.fromkeys(("local", "kept", "mlp"), lambda x, y: sffx.local_loss(module, x, y)),
    }

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            losses[way](a, b).backward()  # type: ignore[attr-defined]
        optimizer.step()

    return Candidate(
        module,
        optimizer,
        step if way != "step" else lambda x, y: sffx.local_step(module, x, y, optimizer),
    )


def checkpointed(net: Any, x: Tensor) -> Tensor:
    """Run the blocks of a net cut without norm as one model, each under a checkpoint."""
    values = {net.plan.inputs[0].name: x}
    for block in net.plan.all_blocks:
        result = checkpoint(
            net.get_submodule(block.target),
            *(values[name] for name in block.inputs),
            use_reentrant=False,
        )
        values.update(
            zip((block.output, *block.sides), result if block.sides else (result,), strict=True)
        )
    return values[net.plan.classifier.output]


def count(way: str, module: nn.Module, workload: Workload, parts: int = 1) -> dict[str, float]:
    """Count bytes and multiply-adds of a step that has the optimizer's state in place, on fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(module, mode)
    with mode:
        made = candidate(way, fake, parts)
        x, y = batch(workload, workload.count_batch)
        made.step(x, y)
        memory = count_memory(lambda: made.step(x, y), model=fake, optimizer=made.optimizer)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE_PRODUCTS) as flops:
            made.step(x, y)
    fields = (
        "parameters",
        "gradients",
        "optimizer_state",
        "optimizer_temporaries",
        "activations",
        "peak",
    )
    return {
        **{name: getattr(memory, name) for name in fields},
        "macs": flops.get_total_flops() // 2,
    }


def batch(workload: Workload, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, workload.size, workload.size), torch.randint(
        0, workload.classes, (size,)
    )


def fitting_parts(model: nn.Module, workload: Workload, activations: float) -> int:
    """Return into how few equal parts a batch must be split for backpropagation to need no more activations than given."""
    parts = 1
    while (
        parts < workload.count_batch
        and count("accumulation", model, workload, parts)["activations"] > activations
    ):
        parts *= 2
    return parts


class FreeHead(nn.Module):
    """A head without products: the mean square of a block's output, the same for every class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, y: Tensor) -> Tensor:
        return y.flatten(1).square().mean(1, keepdim=True).expand(-1, self.classes)


def limit(model: nn.Module, example: Tensor, workload: Workload) -> float:
    """Count the multiply-adds of a block-local step whose heads cost nothing."""
    net: Any = prepare("kept", model, example)
    for i in range(len(net.plan)):
        net.set_submodule(f"head_{i}", FreeHead(workload.classes))
    return count("kept", net, workload)["macs"]


def measure(
    workload: Workload, rounds: int, device: str, timed: tuple[str, ...] = WAYS
) -> dict[str, Any]:
    model = workload.build()
    example = torch.zeros(1, 3, workload.size, workload.size)
    modules = {way: prepare(way, model, example) for way in WAYS}
    counts = {way: count(way, modules[way], workload) for way in WAYS if way != "accumulation"}
    parts = fitting_parts(model, workload, counts["local"]["activations"])
    counts["accumulation"] = count("accumulation", modules["accumulation"], workload, parts)
    record: dict[str, Any] = {
        "name": workload.name,
        "batch": workload.count_batch,
        "parts": parts,
        "counts": counts,
    }
    record["limit"] = limit(model, example, workload)
    if rounds:
        x, y = (t.to(device) for t in batch(workload, workload.time_batch))
        steps = {}
        for way in timed:
            made = candidate(
                way,
                modules[way].to(device),
                min(parts, workload.time_batch // 2) if way == "accumulation" else 1,
            )
            steps[way] = partial(made.step, x, y)
        if device == "cuda":
            record["max_memory_allocated"] = {way: allocated(step) for way, step in steps.items()}
        times = compare_time(steps, rounds=rounds, warmup=1, device=device)
        record |= {
            "time_batch": workload.time_batch,
            "time": {way: times.paired_ratio(way, "BP") for way in timed},
        }
        record["seconds"] = {way: times.median(way) for way in timed}
    print(table(record), flush=True)
    return record


def allocated(step: Callable[[], object]) -> int:
    """Return the most bytes that the GPU's allocator held in a second step, all models of the workload included."""
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def table(record: dict[str, Any]) -> str:
    """Render one workload as a table; everything but the bytes is relative to BP."""
    base = record["counts"]["BP"]
    lines = [
        f"### {record['name']} (memory at batch {record['batch']}, time at {record.get('time_batch', '–')})",
        "",
        "| way | time | peak | activations | multiply-adds | peak, MiB | activations, MiB | gradients, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in (way for way in WAYS if way in record["counts"]):
        found = record["counts"][way]
        ratios = [found[key] / base[key] for key in ("peak", "activations", "macs")]
        mib = [found[key] / 2**20 for key in ("peak", "activations", "gradients")]
        time = f"{record['time'][way]:.2f}" if way in record.get("time", {}) else "–"
        name = f"{way} ({record['parts']} parts)" if way == "accumulation" else way
        lines.append(
            f"| {name} | {time} | {' | '.join(f'{r:.2f}' for r in ratios)} | {' | '.join(f'{m:.1f}' for m in mib)} |"
        )
    fixed = {key: base[key] / 2**20 for key in ("parameters", "optimizer_state")}
    lines += [
        "",
        f"The limit of the multiply-adds, heads left aside, is {record['limit'] / base['macs']:.2f} of BP's.",
    ]
    lines += [
        f"BP holds {fixed['parameters']:.1f} MiB of parameters and {fixed['optimizer_state']:.1f} MiB of optimizer state.",
        "",
    ]
    return "\n".join(lines)


def depth() -> dict[str, Any]:
    """Count activations against depth: bottleneck ResNets of 50 to 1,001 layers, 224 x 224, batch 16."""
    record = {}
    for layers, blocks in {
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        1001: (3, 94, 233, 3),
    }.items():
        workload = Workload("resnet", 224, 1000, 16, 0)
        model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, blocks).train()
        example = torch.zeros(1, 3, 224, 224)
        ways = ("BP", "checkpoint", "local")
        record[layers] = {
            way: count(way, prepare(way, model, example), workload)["activations"] for way in ways
        }
        print(
            f"depth {layers}: "
            + ", ".join(f"{way} {value / 2**20:.0f} MiB" for way, value in record[layers].items()),
            flush=True,
        )
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


def batches(budget: int = 8 * 2**30) -> dict[str, Any]:
    """Count peaks at two batches, 224 x 224, and find from them, since a peak grows in proportion, the largest batch that fits a budget."""
    record: dict[str, Any] = {}
    for workload in WORKLOADS[2:]:
        model, example = workload.build(), torch.zeros(1, 3, workload.size, workload.size)
        record[workload.name] = {}
        for way in ("BP", "checkpoint", "local", "step"):
            module = prepare(way, model, example)
            low, high = (
                count(way, module, replace(workload, count_batch=size))["peak"] for size in (32, 64)
            )
            fits, peak = 64 + int((budget - high) / ((high - low) / 32)), budget + 1.0
            while peak > budget:  # a line through two counts may miss by a sample or two
                peak = count(way, module, replace(workload, count_batch=fits))["peak"]
                fits = (
                    fits
                    if peak <= budget
                    else min(fits - 1, 64 + int((budget - high) / ((peak - high) / (fits - 64))))
                )
            record[workload.name][way] = {"32": low, "64": high, "fits": fits, "peak": peak}
            print(
                f"{workload.name}, {way}: batch {fits} fits {budget / 2**30:.0f} GiB (counted: {peak / 2**30:.2f})",
                flush=True,
            )
    return record


def overhead(repeats: int = 3) -> dict[str, Any]:
    """Measure which part of a block-local step of resnet152, 224 x 224, batch 4, is not spent in blocks, heads, losses and gradients."""
    workload = Workload("resnet152", 224, 1000, 4, 4)
    net = prepare("local", workload.build(), torch.zeros(1, 3, 224, 224))
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        return call

    x, y = batch(workload, 4)
    names = ("block_loss", "_gradients")
    patches = [mock.patch.object(local, name, timed(getattr(local, name))) for name in names]
    patches.append(mock.patch.object(local.BlockWalk, "_value", timed(local.BlockWalk._value)))
    shares = []
    for patch in patches:
        patch.start()
    for _ in range(repeats + 1):
        spent, start = 0.0, time.perf_counter()
        sffx.local_loss(net, x, y)
        shares.append(1 - spent / (time.perf_counter() - start))
    for patch in patches:
        patch.stop()
    share = statistics.median(shares[1:])
    print(
        f"overhead of the outer loop, resnet152 ({len(net.plan)} blocks): {share:.2%} of a step",
        flush=True,
    )
    return {"share": share, "blocks": len(net.plan)}


def settings(rounds: int, device: str) -> dict[str, Any]:
    """Time BP and local on resnet18, 224 x 224, J = 10, batch 8: plain, under bfloat16 autocast, channels-last, and compiled."""
    workload = Workload("resnet18", 224, 10, 8, 8)
    model, example = workload.build(), torch.zeros(1, 3, 224, 224)
    x, y = (t.to(device) for t in batch(workload, 8))
    last = {"memory_format": torch.channels_last}
    record: dict[str, Any] = {"compile_seconds": {}}
    steps: dict[str, Callable[[], object]] = {}
    for way in ("BP", "local"):
        made = candidate(way, prepare(way, model, example).to(device))
        steps[way] = partial(made.step, x, y)
        steps[f"{way}, bfloat16"] = partial(under_autocast, made.step, x, y)
        laid = candidate(way, prepare(way, model, example).to(device, **last))
        steps[f"{way}, channels-last"] = partial(laid.step, x.to(**last), y)
        compiled: Any = prepare(way, model, example).to(device)
        for part in (
            [compiled]
            if way == "BP"
            else [compiled.get_submodule(block.target) for block in compiled.plan]
        ):
            part.compile()
        start = time.perf_counter()
        steps[f"{way}, compiled"] = partial(candidate(way, compiled).step, x, y)
        steps[f"{way}, compiled"]()
        record["compile_seconds"][way] = time.perf_counter() - start
    times = compare_time(steps, rounds=rounds, warmup=1, device=device)
    record["time"] = {name: times.paired_ratio(name, "BP") for name in steps}
    print(json.dumps(record), flush=True)
    return record


def under_autocast(step: Step, x: Tensor, y: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        step(x, y)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw activations against depth, the peak against the number of classes, and the largest batch by way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    found = {name: record[name]["found"] for name in ("depth", "classes", "batch")}
    for way in ("BP", "checkpoint", "local"):
        left.plot(
            [int(d) for d in found["depth"]],
            [counts[way] / 2**20 for counts in found["depth"].values()],
            marker="o",
            label=way,
        )
    left.set(
        xlabel="layers of a bottleneck ResNet",
        ylabel="activations, MiB (224 x 224, batch 16)",
        xscale="log",
        yscale="log",
    )
    left.legend(frameon=False)
    peaks = [counts["peak"] / 2**20 for counts in found["classes"].values()]
    middle.plot([int(j) for j in found["classes"]], peaks, marker="o")
    middle.set(
        xlabel="classes",
        ylabel="peak of a local step, MiB (resnet18, batch 64)",
        xscale="log",
        ylim=(0, None),
    )
    names = [name.split(",")[0] for name in found["batch"]]
    for i, way in enumerate(("BP", "checkpoint", "local", "step")):
        places = [j + 0.2 * i - 0.3 for j in range(len(names))]
        right.bar(places, [ways[way]["fits"] for ways in found["batch"].values()], 0.2, label=way)
    right.set(
        ylabel="largest batch in 8 GiB (224 x 224)", xticks=range(len(names)), xticklabels=names
    )
    right.tick_params(axis="x", labelrotation=15)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
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
    args = parser.parse_args()
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
    where = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    stamp = {"date": str(date.today()), "hardware": f"{where}, torch {torch.__version__}"}
    for part in args.parts:
        if part != "workloads":
            record[part] = {**stamp, "found": measurements[part]()}
            save(record, path)
            continue
        for workload in WORKLOADS:
            if args.only in workload.name:
                record.setdefault("workloads", {})[workload.name] = {
                    **stamp,
                    **measure(workload, args.rounds, args.device, tuple(args.time)),
                }
                save(record, path)
    if {"depth", "classes", "batch"} <= set(record):
        plot(record, args.out / "scaling.png")
    (args.out / "table.md").write_text(report(record))


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record, or leave the old one."""
    write(path, json.dumps(record, indent=1).encode())


def report(record: dict[str, Any]) -> str:
    """Render the record as a page."""
    lines = ["AdamW, float32. Time, peak, activations and multiply-adds are relative to BP.", ""]
    for found in record.get("workloads", {}).values():
        lines += [table(found), f"{found['date']}, {found['hardware']}.", ""]
    for name in PARTS[1:]:
        if name in record:
            stamp = f"{record[name]['date']}, {record[name]['hardware']}"
            lines += [
                f"### {name}",
                "",
                f"{stamp}:",
                "",
                "```",
                json.dumps(record[name]["found"], indent=1),
                "```",
                "",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
