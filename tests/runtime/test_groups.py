"""Groups of the package's own, where torch's own keys and names would not fit together."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from sffx.runtime import groups
from tests.runtime.pipeline.processes import run

SECONDS = timedelta(seconds=20)


def start_twice(rank: int) -> list[float]:
    """Make a group as at two starts of the processes, with one store."""
    sums = []
    for start in ("0", "1"):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = start
        groups._MADE.clear()
        # At the second start, rank 0 looks for rank 1 before it is there.
        time.sleep(rank)
        group = groups.new_group([0, 1], SECONDS)
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        sums.append(total.item())
        # Its addresses stay in the store.
        dist.destroy_process_group(group)
    return sums


def test_a_group_does_not_look_for_processes_of_an_earlier_start(tmp_path):
    assert run(start_twice, 2, tmp_path) == [[2.0, 2.0], [2.0, 2.0]]


def make_unevenly(rank: int) -> list[float]:
    """Make more groups in one process than in the other, the package's own and torch's."""
    if rank == 0:
        groups.new_group([0], SECONDS)
        groups.new_group([0], SECONDS)
    first = groups.new_group([0, 1], SECONDS)
    second = dist.new_group([0, 1], timeout=SECONDS)
    if rank == 1:
        dist.new_group([1], timeout=SECONDS, use_local_synchronization=True)
    third = groups.new_group([1, 0], SECONDS)
    sums = []
    for group in (first, second, third):
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        sums.append(total.item())
    return sums


def test_processes_may_have_made_other_numbers_of_groups(tmp_path):
    assert run(make_unevenly, 2, tmp_path) == [[2.0] * 3, [2.0] * 3]
