"""Process groups of the package's own, and stores that processes share.

Torch lets the processes of a group find each other by keys in a store. `torchrun --max-restarts`
keeps the store when it starts the processes again. A key then holds the address of a process that
has ended, and whoever reads it before it is set anew waits for ever. So each group and each start
has keys of its own here.

Torch also names a group by how many groups a process has made. Where some processes have made
more, they would wait for groups of different names. Here only groups of the same ranks count.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# How many stores this process has made for the same ranks. They all have made as many, while other
# processes may have made more or fewer.
_MADE: Counter[tuple[int, ...]] = Counter()
# Above the number of groups that torch itself counts, so that no two groups have one name.
_FIRST_NUMBER = 10**9


def own_store(ranks: Sequence[int]) -> dist.Store:
    """Return a store without keys, which some processes share. All of them must call it.

    Args:
        ranks: of the processes.
    """
    key = tuple(sorted(ranks))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"sffx, start {start}, store {_MADE[key]} of {key}"
    _MADE[key] += 1
    return dist.PrefixStore(name, _store_of_all())


def new_group(
    ranks: Sequence[int], timeout: timedelta, backend: str | None = "gloo"
) -> dist.ProcessGroup:
    """Return a new group of some processes. These must call it, and no others.

    Args:
        ranks: of the processes.
        timeout: of its collectives.
        backend: that of the default group if None.
    """
    number = _FIRST_NUMBER + _MADE[tuple(sorted(ranks))]
    with _naming_by(number, own_store(ranks)):
        group = dist.new_group(
            list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True
        )
    assert isinstance(group, dist.ProcessGroup)  # this process is part of it
    return group


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor that fills it without a gap as a vector of bytes.

    Not every backend sends every dtype: gloo refuses int16, uint16 and float8.
    """
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


@torch.no_grad()
def share(tensor: Tensor, group: dist.ProcessGroup, source: int = 0) -> None:
    """Give all processes of a group the values of one of them.

    Args:
        tensor: of the same shape and dtype in all processes.
        group: of the processes.
        source: the process that has the values, by its rank in the group.
    """
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(as_bytes(copy), group=group, group_src=source)
    tensor.copy_(copy)


def _store_of_all() -> dist.Store:
    """Return the store of the default group. Torch offers no public way to it."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


@contextmanager
def _naming_by(number: int, store: dist.Store) -> Iterator[None]:
    """Let torch make a group by this number and with this store inside the context."""
    world = dist.distributed_c10d._world
    everyone = dist.distributed_c10d._get_default_group()
    backend, original = world.pg_map[everyone]
    count = world.group_count
    world.pg_map[everyone] = backend, store
    world.group_count = number
    try:
        yield
    finally:
        world.pg_map[everyone] = backend, original
        world.group_count = count
