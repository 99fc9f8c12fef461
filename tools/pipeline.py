"""Measure blocks that train in parallel against the other ways to use two processes.

    OMP_NUM_THREADS=1 python -m tools.pipeline --out tools/results/pipeline

Two processes with one thread each. The ways take turns in one run, each for a few batches at a
time, with AdamW:

- one process, BP, and one process, local: the other process waits;
- pipeline: `sffx.Pipeline`;
- GPipe and 1F1B: torch's schedules, by backpropagation, with four microbatches. The model is
  divided where its measured seconds balance best;
- DDP, BP and DDP, local: half a batch in each process, `LocalLoss` for the latter;
- replicate: half a batch in each process, by `sffx.replicate` and `local_step`.

Images a second are medians over the rounds. CPU seconds are those of the busier process: on shared
cores they say more than the clock. Bytes are those that a process sends for a batch. Peaks are
counted to the byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import sffx
from sffx.files import write
from sffx.memory.count import count_memory
from sffx.runtime.pipeline.balance import balanced
from tools.options import at_least

CLASSES = 10
MICROBATCHES = 4
PROCESSES = 2

RESULTS = Path("tools/results/pipeline")


@dataclass
class Way:
    """A way to train.

    Attributes:
        train: trains on a number of batches.
        model: of this process, with the optimizer; their memory is counted.
        optimizer: of this process.
        sent: bytes that this process sends for a batch.
    """

    train: Callable[[int], object]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sent: int = 0


@dataclass(frozen=True)
class Workload:
    """A model and its batches."""

    model: str
    size: int
    batch: int

    def build(self) -> nn.Module:
        """Return the model, with the same weights in every process."""
        torch.manual_seed(0)
        model: nn.Module = torchvision.models.get_model(self.model, num_classes=CLASSES)
        return model

    def cut(self) -> Any:
        """Return the cut model."""
        example = torch.zeros(2, 3, self.size, self.size)
        return sffx.transform(self.build(), example_input=example, check=False)

    def data(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return a batch."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 3, self.size, self.size, generator=generator)
        return x, torch.randint(0, CLASSES, (samples,), generator=generator)


WORKLOADS = (Workload("resnet18", 32, 128), Workload("mobilenet_v3_small", 64, 64))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of all ways."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def alone_by_backpropagation(workload: Workload, rank: int) -> Way:
    """Return training in the first process alone."""
    model = workload.build()
    optimizer = adamw(model.parameters())
    x, y = workload.data(workload.batch)

    def train(batches: int) -> None:
        for _ in range(batches if rank == 0 else 0):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return Way(train, model, optimizer)


def alone_by_blocks(workload: Workload, rank: int) -> Way:
    """Return block-local training in the first process alone."""
    net = workload.cut()
    optimizer = adamw(sffx.parameter_groups(net, lr=1e-3))
    x, y = workload.data(workload.batch)

    def train(batches: int) -> None:
        for _ in range(batches if rank == 0 else 0):
            sffx.local_step(net, x, y, optimizer)

    return Way(train, net, optimizer)


def by_pipeline(workload: Workload) -> tuple[Way, sffx.Pipeline]:
    """Return training by `sffx.Pipeline`, and the pipeline."""
    x, y = workload.data(workload.batch)
    pipe = sffx.Pipeline(workload.cut(), example_input=x)
    optimizer = adamw(pipe.parameter_groups(lr=1e-3))

    def train(batches: int) -> None:
        before = pipe.bytes_sent
        pipe.train([(x, y)] * batches if pipe.first else None, optimizer)
        way.sent = (pipe.bytes_sent - before) // batches

    way = Way(train, pipe.module, optimizer)
    return way, pipe


def by_schedule(
    workload: Workload, rank: int, schedule_class: type[ScheduleGPipe | Schedule1F1B]
) -> Way:
    """Return training by a schedule of torch."""
    units = _units(workload.build())
    begin = _balanced_begin(units, workload)
    x, y = workload.data(workload.batch)
    with torch.no_grad():
        crossing = nn.Sequential(*units[:begin]).eval()(x)
    own = nn.Sequential(*(units[begin:] if rank else units[:begin])).train()
    stage = PipelineStage(own, rank, PROCESSES, torch.device("cpu"))
    schedule = schedule_class(stage, MICROBATCHES, loss_fn=F.cross_entropy)
    optimizer = adamw(own.parameters())

    def train(batches: int) -> None:
        for _ in range(batches):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=y)
            optimizer.step()

    # Downstream the activations of a batch, and upstream their gradients.
    return Way(train, own, optimizer, crossing.numel() * crossing.element_size())


def by_ddp(workload: Workload, *, by_blocks: bool) -> Way:
    """Return training by `DistributedDataParallel`, with a share of the batch in each process."""
    model = sffx.LocalLoss(workload.cut()) if by_blocks else workload.build()
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(model.parameters())
    x, y = workload.data(workload.batch // PROCESSES)

    def train(batches: int) -> None:
        for _ in range(batches):
            optimizer.zero_grad()
            loss = wrapped(x, y) if by_blocks else F.cross_entropy(wrapped(x), y)
            loss.backward()
            optimizer.step()

    return Way(train, model, optimizer, _bytes_of(model))


def by_replicas(workload: Workload) -> Way:
    """Return training by `sffx.replicate`, with a share of the batch in each process."""
    net = workload.cut()
    sffx.replicate(net)
    optimizer = adamw(sffx.parameter_groups(net, lr=1e-3))
    x, y = workload.data(workload.batch // PROCESSES)

    def train(batches: int) -> None:
        for _ in range(batches):
            sffx.local_step(net, x, y, optimizer)

    return Way(train, net, optimizer, _bytes_of(net))


def _bytes_of(model: nn.Module) -> int:
    """Return the bytes of the gradients. Each of two processes on a ring sends as many."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _units(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, to be run one after the other."""
    units: list[nn.Module] = []
    for name, child in model.named_children():
        if name in ("fc", "classifier"):
            units.append(nn.Flatten(1))
        units += child if isinstance(child, nn.Sequential) else [child]
    return units


def _balanced_begin(units: list[nn.Module], workload: Workload) -> int:
    """Return the index of the first unit of the second stage. The first process measures."""
    seconds = torch.zeros(len(units))
    if dist.get_rank() == 0:
        seconds = torch.tensor(_seconds_of_units(units, workload))
    dist.broadcast(seconds, 0)
    return balanced(seconds.tolist(), PROCESSES, {})[1]


def _seconds_of_units(units: list[nn.Module], workload: Workload) -> list[float]:
    """Return the seconds of a step on each unit: of all microbatches, and of the optimizer."""
    x, _ = workload.data(workload.batch // MICROBATCHES)
    seconds = []
    for unit in units:
        parameters = list(unit.parameters())
        optimizer = adamw(parameters) if parameters else None
        measured = []
        for _ in range(4):
            own = x.detach().requires_grad_()
            start = time.perf_counter()
            # The optimizer steps once for all microbatches, as it does under a schedule.
            for _ in range(MICROBATCHES):
                # A layer may write in place, which a leaf does not allow.
                output = unit(own.clone())
                output.sum().backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            measured.append(time.perf_counter() - start)
        seconds.append(statistics.median(measured[1:]))
        x = output.detach()
    return seconds


@dataclass
class Found:
    """What one process measured of one way.

    Attributes:
        seconds: of a batch, by round.
        cpu: seconds of this process for a batch, by round.
        sent: bytes for a batch.
        peak: bytes that a training on three batches holds.
    """

    seconds: list[float]
    cpu: list[float]
    sent: int = 0
    peak: int = 0


def measure(rank: int, folder: str, workload: Workload, rounds: int, batches: int) -> None:
    """Measure all ways in one process, and leave the results in a file."""
    torch.set_num_threads(1)
    # `local_step` in one of two processes says that nothing is averaged.
    warnings.filterwarnings("ignore", message="local_step does not average")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES
    )
    pipeline, pipe = by_pipeline(workload)
    ways = {
        "one process, BP": alone_by_backpropagation(workload, rank),
        "one process, local": alone_by_blocks(workload, rank),
        "pipeline": pipeline,
        "GPipe": by_schedule(workload, rank, ScheduleGPipe),
        "1F1B": by_schedule(workload, rank, Schedule1F1B),
        "DDP, BP": by_ddp(workload, by_blocks=False),
        "DDP, local": by_ddp(workload, by_blocks=True),
        "replicate": by_replicas(workload),
    }
    found = {name: Found([], []) for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            seconds, cpu = timed(way, batches)
            found[name].sent = way.sent
            # The first round warms up.
            if number:
                found[name].seconds.append(seconds)
                found[name].cpu.append(cpu)
    for name in ("one process, BP", "one process, local", "pipeline"):
        way = ways[name]
        step = partial(way.train, 3)
        found[name].peak = count_memory(step, model=way.model, optimizer=way.optimizer).peak
    result = {name: asdict(each) for name, each in found.items()}
    torch.save((result, pipe.blocks, pipe.seconds), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)


def timed(way: Way, batches: int) -> tuple[float, float]:
    """Return the seconds of a batch by the clock, and the CPU seconds of this process."""
    dist.barrier()
    start = time.perf_counter()
    cpu_start = time.process_time()
    way.train(batches)
    cpu = time.process_time() - cpu_start
    dist.barrier()
    return (time.perf_counter() - start) / batches, cpu / batches


def table(workload: Workload, by_rank: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table: what the ways of one workload take."""
    lines = [
        "| way | images a second | CPU s a batch, busier process | MB sent a batch | "
        "peak by process, MiB |",
        "|---|---|---|---|---|",
    ]
    for name in by_rank[0]:
        of_way = [each[name] for each in by_rank]
        rate = workload.batch / statistics.median(of_way[0]["seconds"])
        cpu = max(statistics.median(each["cpu"]) for each in of_way)
        sent = max(each["sent"] for each in of_way) / 1e6
        peaks = [f"{each['peak'] / 2**20:.0f}" for each in of_way if each["peak"]]
        lines.append(f"| {name} | {rate:.0f} | {cpu:.3f} | {sent:.2f} | {', '.join(peaks)} |")
    return lines


def remarks(workload: Workload, by_rank: list[dict[str, Any]], blocks: list[list[str]]) -> str:
    """Return how near the pipeline comes to what its stages allow."""
    cpu = [statistics.median(each["pipeline"]["cpu"]) for each in by_rank]
    rate = workload.batch / statistics.median(by_rank[0]["pipeline"]["seconds"])
    alone = workload.batch / statistics.median(by_rank[0]["one process, local"]["seconds"])
    at_best = workload.batch / max(cpu)
    return (
        f"Stages: {blocks[0][0]} to {blocks[0][-1]} and {blocks[1][0]} to {blocks[1][-1]}, with "
        f"{cpu[0]:.3f} and {cpu[1]:.3f} CPU seconds a batch. So {at_best:.0f} images a second are "
        f"possible, and the pipeline reaches {rate / at_best:.2f} of that. It is "
        f"{rate / alone:.2f} times as fast as one process."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--batches", type=at_least(1), default=6, help="in a round")
    parser.add_argument(
        "--model",
        choices=[workload.model for workload in WORKLOADS],
        help="one workload only, into another --out",
    )
    args = parser.parse_args(arguments)
    if args.model and args.out == RESULTS:
        parser.error(
            f"{RESULTS} holds the record of all workloads, and --model measures one. "
            "Hint: name another folder by --out"
        )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    machine = f"{platform.machine()}, {PROCESSES} processes of one thread, {os.cpu_count()} cores"
    lines = [f"{date.today()}, {machine}, torch {torch.__version__}, {args.rounds} rounds."]
    records: dict[str, Any] = {}
    for workload in WORKLOADS:
        if args.model not in (None, workload.model):
            continue
        with TemporaryDirectory() as folder:
            arguments_of_process = (folder, workload, args.rounds, args.batches)
            mp.spawn(measure, arguments_of_process, PROCESSES)
            loaded = [torch.load(f"{folder}/{rank}.pt") for rank in range(PROCESSES)]
        by_rank = [each[0] for each in loaded]
        title = f"{workload.model}, {workload.size} x {workload.size}, batch {workload.batch}"
        lines += ["", f"### {title}", "", *table(workload, by_rank), ""]
        lines.append(remarks(workload, by_rank, [each[1] for each in loaded]))
        records[workload.model] = {
            "samples": workload.batch,
            "batches": args.batches,
            "found": by_rank,
            "seconds_of_blocks": loaded[0][2],
        }
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "table.md", ("\n".join(lines) + "\n").encode())
    write(args.out / "record.json", (json.dumps(records, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
