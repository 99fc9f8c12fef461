"""The end of a process that a test has spawned."""

from __future__ import annotations

import os

import torch.distributed as dist


def leave() -> None:
    """End the process, once all processes of the group have done their work.

    What a process found lies in a file by now. Python's own end is left out: torch's threads of
    gloo are sometimes still there when their memory goes, and then the process aborts.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
