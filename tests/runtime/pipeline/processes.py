"""Run a function in several processes that are connected, and collect what each of them found."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sffx
from tests.processes import forkserver

# A process that takes longer than this hangs.
SECONDS = 150


def run(
    function: Callable[..., Any], processes: int, folder: Path, *args: Any, grace: float = SECONDS
) -> list[Any]:
    """Return what a function returns in each of some processes.

    A process that raised has its error, an `Exception`; one that ended otherwise has its exit code.

    Args:
        function: called with the rank and `args`.
        processes: how many.
        folder: for what they find.
        args: of the function.
        grace: seconds that the others have once one has ended. Those that hang are killed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = forkserver()
    started = []
    for rank in range(processes):
        arguments = (function, rank, processes, str(folder), args)
        started.append(context.Process(target=_in_process, args=arguments, daemon=True))
        started[-1].start()
    _join(started, grace)
    results = []
    for rank, process in enumerate(started):
        if process.is_alive():
            process.kill()
            results.append(TimeoutError(f"rank {rank} did not end"))
        elif (folder / f"{rank}.pt").exists():
            results.append(torch.load(folder / f"{rank}.pt", weights_only=False))
        else:
            results.append(process.exitcode)
    return results


def _join(processes: list[Any], grace: float) -> None:
    """Wait until all processes have ended, or have had their time."""
    end = time.monotonic() + SECONDS
    is_first = True
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
        if is_first and not all(process.is_alive() for process in processes):
            is_first = False
            end = min(end, time.monotonic() + grace)


def _in_process(
    function: Callable[..., Any], rank: int, processes: int, folder: str, args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    try:
        found = function(rank, *args)
    except Exception as error:
        traceback.print_exc()
        found = sffx.SffxError(f"{type(error).__name__}: {error}")
    part = Path(folder) / f"{rank}.part"
    torch.save(found, part)
    part.rename(Path(folder) / f"{rank}.pt")
    # Python's own end is left out: gloo's threads sometimes abort in it.
    os._exit(0)
