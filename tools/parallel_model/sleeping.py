"""Run pipelines whose stages sleep instead of computing, to check the model's order of tasks.

    OMP_NUM_THREADS=1 python -m tools.parallel_model.sleeping

Processes that sleep do not compete for cores. So the engine of `sffx.Pipeline` and the schedules of
torch can be timed with more processes than cores, and the seconds of each stage are known.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import sffx
from sffx.files import write
from tools.parallel_model.schedules import Layers, LocalBlock, by_microbatches, local_epoch
from tools.parallel_model.ways import DEPTH

WIDTH = 16
SAMPLES = 32
BATCHES = 8
MICROBATCHES = 4
# Forward seconds of a batch by stage; a backward pass takes twice as long.
FORWARD = (0.10, 0.06, 0.08, 0.04)
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


def _sleep_and_pass(seconds: float, gradient: Tensor) -> None:
    """Sleep in a backward pass, as a hook of a tensor."""
    time.sleep(seconds)


def _sleep_around(forward: float, module: nn.Module, args: object, output: Tensor) -> None:
    """Sleep behind a module and before its backward pass, as a forward hook."""
    time.sleep(forward)
    if output.requires_grad:
        output.register_hook(partial(_sleep_and_pass, 2 * forward))


def _layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


def _time_pipeline(rank: int, stages: int) -> float:
    """Return the seconds of some batches in `sffx.Pipeline`, with a block for each stage."""
    torch.manual_seed(0)
    *layers, last = (_layer() for _ in range(stages))
    model = nn.Sequential(*layers, nn.Sequential(last, nn.Linear(WIDTH, 4)))
    # A cut behind each layer but the last.
    names = [f"_{i}_1" for i in range(stages - 1)]
    example = torch.zeros(1, WIDTH)
    net = sffx.transform(model, policy=names, example_input=example, check=False)
    blocks = [*(f"block_{i}" for i in range(stages - 1)), "classifier"]
    pipe = sffx.Pipeline(net, cuts=blocks[1:])
    optimizer = torch.optim.SGD(pipe.parameter_groups(lr=0.0))
    batch = (torch.randn(SAMPLES, WIDTH), torch.zeros(SAMPLES, dtype=torch.int64))
    pipe.train([batch] if pipe.first else None, optimizer)
    pipe.net.get_submodule(blocks[rank]).register_forward_hook(
        partial(_sleep_around, FORWARD[rank])
    )
    dist.barrier()
    start = time.perf_counter()
    pipe.train([batch] * BATCHES if pipe.first else None, optimizer)
    dist.barrier()
    return (time.perf_counter() - start) / BATCHES


def _time_schedule(rank: int, stages: int, name: str) -> float:
    """Return the seconds of a batch in a schedule of torch."""
    own = _layer()
    stage = PipelineStage(own, rank, stages, torch.device("cpu"))
    schedule = SCHEDULES[name](stage, MICROBATCHES, loss_fn=F.cross_entropy)
    x = torch.randn(SAMPLES, WIDTH)
    y = torch.zeros(SAMPLES, dtype=torch.int64)

    def step() -> None:
        if rank == 0:
            schedule.step(x)
        elif rank == stages - 1:
            schedule.step(target=y)
        else:
            schedule.step()

    step()
    own.register_forward_hook(partial(_sleep_around, FORWARD[rank] / MICROBATCHES))
    dist.barrier()
    start = time.perf_counter()
    for _ in range(BATCHES):
        step()
    dist.barrier()
    return (time.perf_counter() - start) / BATCHES


def _measure(rank: int, folder: str, stages: int) -> None:
    """Measure all ways in one process; the first one leaves the seconds in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=stages
    )
    seconds = {"pipeline": _time_pipeline(rank, stages)}
    for name in SCHEDULES:
        seconds[name] = _time_schedule(rank, stages, name)
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    dist.barrier()
    os._exit(0)


def predicted(way: str, stages: int) -> float:
    """Return the seconds of a batch that the model predicts, with links that take no time."""
    transfers = [0.0] * (stages - 1)
    if way == "pipeline":
        blocks = [[LocalBlock(seconds, 2 * seconds)] for seconds in FORWARD[:stages]]
        return local_epoch(blocks, transfers, DEPTH, BATCHES) / BATCHES
    layers = []
    for seconds in FORWARD[:stages]:
        of_microbatch = seconds / MICROBATCHES
        layers.append([Layers(of_microbatch, 2 * of_microbatch)])
    schedule: Literal["GPipe", "1F1B"] = "GPipe" if way == "GPipe" else "1F1B"
    return by_microbatches(layers, transfers, MICROBATCHES, schedule).seconds


def measured(stages: int) -> dict[str, float]:
    """Return the seconds of a batch by way, with so many processes."""
    with TemporaryDirectory() as folder:
        mp.spawn(_measure, (folder, stages), stages)
        found: dict[str, float] = json.loads(Path(folder, "seconds.json").read_text())
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/parallel"))
    args = parser.parse_args(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found: list[dict[str, Any]] = []
    for stages in (2, 4):
        for way, seconds in measured(stages).items():
            entry = {"stages": stages, "way": way, "measured": seconds}
            found.append({**entry, "predicted": predicted(way, stages)})
    print("\n".join(map(str, found)))
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "sleeping.json", (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
