"""Processes that a test starts, which are connected."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

# All processes are on this machine, and its name need not have an address.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# What the processes import, and what `transform` imports when it first runs.
PRELOADED = [
    "sffx.api",
    "tests.runtime.pipeline.models",
    "tests.runtime.test_shard",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torchvision",
]


def forkserver() -> Any:
    """Return the context of processes that fork from a server, which has imported torch once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def spawn(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Run a function in several processes, and raise the first error.

    Args:
        function: called with the rank and `args`.
        processes: how many.
        args: of the function.
    """
    forkserver()
    mp.start_processes(function, args, processes, start_method="forkserver")


def leave() -> None:
    """End the process, once all processes of the group have done their work.

    What a process found lies in a file by now. Python's own end is left out: torch's threads of
    gloo are sometimes still there when their memory goes, and then the process aborts.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
