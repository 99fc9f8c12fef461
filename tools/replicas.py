"""Measure the communication that a training step waits for, on a slow network that is simulated.

    OMP_NUM_THREADS=1 python -m tools.replicas --out tools/results/replicas

One process plays one of the replicas on a ring. Sums over the processes take as long as a ring
needs, in a thread that sleeps, one sum after the other. So they cost time and no arithmetic. The
ways to train, each with AdamW:

- DDP, BP: `DistributedDataParallel(model)`, backpropagation;
- DDP, local: `DistributedDataParallel(sffx.LocalLoss(net))`;
- replicate: `sffx.local_step` of a net as `sffx.replicate` leaves it.

Each way runs with the slow ring and with one that takes no time, alternating. What a step waits for
is the median of the differences. The ring is busy for 2 (N - 1) / N times the bytes of the
gradients, divided by its bandwidth; the latency of a sum is added.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import statistics
import threading
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sffx
from sffx.files import write
from sffx.runtime.agreement import Agreement
from sffx.runtime.replicate import Replication
from tools.options import at_least

MB = 1e6


class Transfer(dist._Work):
    """A sum that is done when the ring is done with it. The values stay as they are."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.seconds = 0.0
        self.future: Any = torch.futures.Future()

    def wait(self, timeout: Any = None) -> bool:
        self.future.wait()
        return True

    def is_completed(self) -> bool:
        return bool(self.future.done())

    def get_future(self) -> Any:
        return self.future


class Ring(dist.ProcessGroup):
    """Processes on a ring of which only this one is there.

    Attributes:
        bandwidth: of each link, in bytes a second.
        latency: of a sum, in seconds.
        is_slow: whether sums take time.
        busy: for how many seconds sums have taken the links, since it was last set to zero.
    """

    def __init__(self, processes: int, bandwidth: float, latency: float) -> None:
        super().__init__(0, processes)  # type: ignore[call-arg]  # a constructor the stub lacks
        self.processes = processes
        self.bandwidth = bandwidth
        self.latency = latency
        self.is_slow = False
        self.busy = 0.0
        self._waiting: queue.Queue[Transfer] = queue.Queue()
        threading.Thread(target=self._transfer, daemon=True).start()

    def _transfer(self) -> None:
        while True:
            work = self._waiting.get()
            time.sleep(work.seconds)
            work.future.set_result(work.tensors)

    def _begin(self, tensors: list[Tensor], seconds: float) -> Transfer:
        work = Transfer(tensors)
        if self.is_slow:
            work.seconds = seconds
            self.busy += seconds
        self._waiting.put(work)
        return work

    # DDP calls these three by one of their overloads.

    def allreduce(  # type: ignore[override]
        self, tensors: list[Tensor], options: Any = None
    ) -> Transfer:
        """Take as long as a ring needs to add tensors and to hand the sums around."""
        size = sum(tensor.nbytes for tensor in tensors)
        steps = 2 * (self.processes - 1)
        return self._begin(tensors, steps * size / self.processes / self.bandwidth + self.latency)

    def broadcast(  # type: ignore[override]
        self, tensors: list[Tensor], options: Any = None
    ) -> Transfer:
        """Leave tensors as they are. DDP broadcasts running statistics before each step."""
        return self._begin(tensors, self.latency)

    def allgather(  # type: ignore[override]
        self, found: Any, tensors: list[Tensor], options: Any = None
    ) -> Transfer:
        """Return this process's own tensors as those of all."""
        for every, own in zip(found, tensors, strict=True):
            for each in every:
                each.copy_(own)
        return self._begin(tensors, 0.0)

    def size(self) -> int:
        return self.processes

    def getBackendName(self) -> str:
        return "ring"


Step = Callable[[], object]


def by_ddp(model: nn.Module, loss: Callable[[nn.Module], Tensor], ring: Ring) -> Step:
    """Return a step under `DistributedDataParallel`."""
    wrapped = DistributedDataParallel(model, process_group=ring)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped).backward()
        optimizer.step()

    return step


def by_replicate(net: Any, x: Tensor, y: Tensor, ring: Ring) -> Step:
    """Return a block-local step of a net that is replicated on a ring."""
    # As `sffx.replicate` does it; the other processes of the ring say nothing.
    replication = Replication(net, Agreement([0], timedelta(minutes=1)), ring)
    net.replication = replication
    replication.put_gates()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=1e-3))
    return lambda: sffx.local_step(net, x, y, optimizer)


def ways(name: str, size: int, batch: int, classes: int, ring: Ring) -> dict[str, Step]:
    """Return a step of each way, by its name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator)
    y = torch.randint(0, classes, (batch,), generator=generator)
    build = getattr(torchvision.models, name)
    example = torch.zeros(1, 3, size, size)

    def cut() -> Any:
        return sffx.transform(build(num_classes=classes), example_input=example)

    return {
        "DDP, BP": by_ddp(build(num_classes=classes), lambda m: F.cross_entropy(m(x), y), ring),
        "DDP, local": by_ddp(sffx.LocalLoss(cut()), lambda m: m(x, y), ring),
        "replicate": by_replicate(cut(), x, y, ring),
    }


def measure(steps: dict[str, Step], ring: Ring, rounds: int, steps_a_round: int) -> dict[str, Any]:
    """Return the seconds of a step of each way with and without a slow ring, by round."""
    found: dict[str, Any] = {name: {"slow": [], "free": [], "busy": []} for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            for is_slow in (False, True):
                seconds, busy = timed(step, ring, steps_a_round, is_slow=is_slow)
                # The first round warms up.
                if number:
                    found[name]["slow" if is_slow else "free"].append(seconds)
                if number and is_slow:
                    found[name]["busy"].append(busy)
    return found


def timed(step: Step, ring: Ring, repeats: int, *, is_slow: bool) -> tuple[float, float]:
    """Return the seconds of a step, and those that the ring is busy in it.

    One step runs before: what it has sent is waited for in the next one.
    """
    ring.is_slow = is_slow
    step()
    ring.busy = 0.0
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats, ring.busy / repeats


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines of a table: what each way waits for."""
    lines = [
        "| way | step without communication, s | ring busy, s | step waits for, s |",
        "|---|---|---|---|",
    ]
    for name, times in found.items():
        exposed = exposed_seconds(times)
        free = statistics.median(times["free"])
        busy = statistics.median(times["busy"])
        lines.append(f"| {name} | {free:.3f} | {busy:.3f} | {exposed:.3f} |")
    return lines


def exposed_seconds(times: dict[str, list[float]]) -> float:
    """Return the median of what a step takes longer on the slow ring."""
    pairs = zip(times["slow"], times["free"], strict=True)
    return statistics.median(slow - free for slow, free in pairs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/replicas"))
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--size", type=at_least(1), default=32)
    parser.add_argument("--batch", type=at_least(1), default=128)
    parser.add_argument("--classes", type=at_least(1), default=10)
    parser.add_argument("--processes", type=at_least(2), default=8)
    parser.add_argument("--bandwidth", type=float, default=250.0, help="of a link, in MB a second")
    parser.add_argument("--latency", type=float, default=1e-4, help="of a sum, in seconds")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--steps", type=at_least(1), default=3, help="steps in a round")
    args = parser.parse_args(arguments)
    ring = Ring(args.processes, args.bandwidth * MB, args.latency)
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            steps = ways(args.model, args.size, args.batch, args.classes, ring)
            found = measure(steps, ring, args.rounds, args.steps)
        finally:
            dist.destroy_process_group()
    options = {name: value for name, value in vars(args).items() if name != "out"}
    threads = f"{torch.get_num_threads()} thread of {os.cpu_count()} shared cores"
    lines = [
        f"{date.today()}, {platform.machine()}, {threads}, torch {torch.__version__}: "
        + ", ".join(f"{name} {value}" for name, value in options.items()),
        "",
        *table(found),
    ]
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "table.md", ("\n".join(lines) + "\n").encode())
    record = json.dumps({**options, "seconds": found}, indent=1) + "\n"
    write(args.out / "record.json", record.encode())


if __name__ == "__main__":
    main()
