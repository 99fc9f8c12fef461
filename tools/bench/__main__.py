"""Measure a training step by backpropagation, its rivals, and sffx: memory, arithmetic, time.

    python -m tools.bench --out tools/results/bench
    python -m tools.bench --device cuda --quick

Memory, arithmetic and operations are counted on fake tensors at the large batch; nothing is
computed. Time is measured at the small batch, the ways to train alternating in one run. AdamW,
float32, default policy. The ways:

- BP: plain backpropagation;
- checkpoint: backpropagation with `torch.utils.checkpoint` around the same blocks, with the model's
  own layers;
- accumulation: backpropagation over as many smaller batches as bring its activations down to those
  of the local step;
- in backward: backpropagation, each parameter updated as soon as its gradient is there; also with
  checkpoints;
- deferred: `sff_loss(net(x), y).backward()`;
- local: `local_loss(net, x, y).backward()`;
- step: `local_step(net, x, y, optimizer)`;
- kept: local, with `recompute=False`;
- mlp: local, with `goodness="mlp"`;
- host memory: BP whose activations wait in host memory, on a GPU only;
- eight bits: BP with AdamW in eight bits, where torchao is installed;
- BP, budget and local, compiled: by `torch.compile`, with half of the activations as a budget, and
  by `sffx.compile`.

Operations are those that forward and backward dispatch, views left out: a proxy for the launches on
a GPU. Bytes are what they read and write, a proxy for the time of a step that memory limits. The
optimizer is left out of both (`tools.operations` says where they come from).

The limit is the part that a block-local step cannot do without: the forward pass, the gradients of
the weights, and those of the values inside the blocks. Heads are left aside.

Beyond the workloads there are:

- small: small networks, where a step of many small operations shows;
- depth: activations of ResNets of 50 to 1,001 layers;
- classes: 10 to 21,841 classes;
- batch: peaks, and the largest batch that fits a budget;
- overhead: the outer loop's share of a step of resnet152;
- settings: bfloat16 autocast, channels-last;
- compiled: compiled steps, and the seconds to compile them;
- family: a step of supervised Forward-Forward beside one of SFF.

`--parts` chooses among them. A part that was measured before stays in the record. `--device cuda`
measures the part "cuda" on a GPU: time by events, memory, launches by the profiler, TF32, bfloat16,
compiled steps, offloading. With `--quick` it fits in eight minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sffx.files import write
from tools.bench.cuda import on_gpu
from tools.bench.page import plot, report
from tools.bench.parts import (
    TIMED,
    batches,
    classes,
    compiled,
    depth,
    family,
    measure,
    overhead,
    settings,
    small,
)
from tools.bench.ways import WAYS
from tools.bench.workloads import WORKLOADS
from tools.options import at_least

PARTS = (
    "workloads",
    "small",
    "depth",
    "classes",
    "batch",
    "overhead",
    "settings",
    "compiled",
    "family",
)


# These have no counts, or none without times.
TIMED_ONLY = ("overhead", "settings", "compiled", "family")


def main() -> None:
    args = _checked(_parser())
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "record.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stamp = {"date": str(date.today()), "hardware": hardware(args.device)}
    if args.device == "cuda":
        record["cuda"] = {**stamp, "found": on_gpu(args.rounds, quick=args.quick)}
        save(record, path)
    else:
        _measure_parts(args, record, stamp, path)
    if {"depth", "classes", "batch"} <= set(record):
        plot(record, args.out / "scaling.png")
    (args.out / "table.md").write_text(report(record))


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments; end with a message where they would fail after hours of counting."""
    args = parser.parse_args()
    timed_only = [part for part in args.parts if part in TIMED_ONLY]
    if args.rounds == 1:
        parser.error("--rounds takes 2 or more, or 0 to count only, not 1")
    if not args.rounds and args.device == "cuda":
        parser.error("--rounds 0 only counts, which needs no GPU. Hint: leave out --device cuda")
    if not args.rounds and args.parts != PARTS and timed_only:
        parser.error(f"--rounds 0 only counts, and these parts are times: {', '.join(timed_only)}")
    if not args.rounds:
        args.parts = [part for part in args.parts if part not in TIMED_ONLY]
    if "BP" not in args.time:
        parser.error(f"--time lacks BP, which times are relative to: {', '.join(args.time)}")
    if not any(args.only in workload.name for workload in WORKLOADS):
        known = "; ".join(workload.name for workload in WORKLOADS)
        parser.error(f"no workload has {args.only!r} in its name. Hint: there are {known}")
    return args


def _measure_parts(
    args: argparse.Namespace, record: dict[str, Any], stamp: dict[str, str], path: Path
) -> None:
    measurements: dict[str, Callable[[], Any]] = {
        "small": partial(small, args.rounds),
        "depth": depth,
        "classes": partial(classes, args.rounds),
        "batch": batches,
        "overhead": overhead,
        "settings": partial(settings, args.rounds),
        "compiled": partial(compiled, args.rounds),
        "family": partial(family, args.rounds),
    }
    for part in args.parts:
        if part != "workloads":
            record[part] = {**stamp, "found": measurements[part]()}
            save(record, path)
            continue
        for workload in WORKLOADS:
            if args.only in workload.name:
                measured = measure(workload, args.rounds, args.time)
                record.setdefault("workloads", {})[workload.name] = {**stamp, **measured}
                save(record, path)


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record, or leave the old one."""
    write(path, json.dumps(record, indent=1).encode())


def hardware(device: str) -> str:
    """Return where time is measured, and the version of torch."""
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/bench"))
    parser.add_argument(
        "--rounds", type=at_least(0), default=8, help="of each time measurement; 0 only counts"
    )
    parser.add_argument(
        "--only", default="", help="a part of the names of the workloads to measure"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--time",
        nargs="+",
        choices=tuple(WAYS),
        default=TIMED,
        help="the ways that are timed, BP among them",
    )
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where time is measured"
    )
    parser.add_argument("--quick", action="store_true", help="four workloads on the GPU")
    return parser


if __name__ == "__main__":
    main()
