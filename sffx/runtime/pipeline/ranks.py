"""The processes of a pipeline, as one of them sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sffx.errors import InputError, ProcessError
from sffx.runtime.groups import own_store, share
from sffx.runtime.pipeline.places import Connections, Place, connect
from sffx.runtime.pipeline.watch import Watch


class Ranks:
    """Asks all processes, and waits for them.

    Args:
        place: of this process.
        timeout: how long the others wait for a process that hangs.

    Attributes:
        place: as above.
        watch: waits for other processes.
        device: that this process computes on, once it is connected.
    """

    device: torch.device

    def __init__(self, place: Place, timeout: timedelta) -> None:
        self.place = place
        own = own_store(place.everyone)
        names = {rank: f"rank {rank}" for rank in place.everyone}
        self.watch = Watch(own, names, place.rank, timeout)
        self._connections: Connections | None = None

    @property
    def connections(self) -> Connections:
        """The process groups."""
        assert self._connections is not None  # `connect` comes first
        return self._connections

    def connect(self, device: torch.device) -> None:
        """Make the process groups. All processes must call it.

        Args:
            device: that this process computes on.

        Raises:
            ProcessError: another process failed before it came here, or did not come.
        """
        self.device = device
        # First all meet, since torch waits for a process that does not come, and cannot be
        # interrupted.
        self.watch.meet()
        self._connections = connect(self.place, device)

    def require_same_action(self, action: str, value: Any = None) -> list[Any]:
        """Return a value of each process; raise a ProcessError unless all do the same.

        Args:
            action: what this process does, "trains".
            value: of this process.
        """
        found = self.from_everyone((action, value))
        actions = [other for other, _ in found]
        if len(set(actions)) > 1:
            phrases = []
            for rank, other in zip(self.place.everyone, actions, strict=True):
                phrases.append(f"{self.name_of(rank)} {other}")
            raise ProcessError(
                f"the processes do different things: {'; '.join(phrases)}. Hint: call train, "
                "evaluate and gather in all processes, in the same order and with the same options"
            )
        return [of_process for _, of_process in found]

    def name_stages(self, blocks: Sequence[Sequence[str]]) -> None:
        """Name the blocks of each process in messages.

        Args:
            blocks: names of the blocks of each stage.
        """
        for stage, own in enumerate(blocks):
            for rank in self.place.ranks[stage]:
                self.watch.names[rank] = f"rank {rank} (stage {stage}: {own[0]} to {own[-1]})"

    def name_of(self, rank: int) -> str:
        """Return the name of a process in messages."""
        return self.watch.names[rank]

    def from_everyone(self, value: Any) -> list[Any]:
        """Return what each process has, those of the first stage first."""
        everyone = self.place.everyone
        gathered: list[Any] = [None] * len(everyone)
        group = self.connections.everyone
        self.watch.call(lambda: dist.all_gather_object(gathered, value, group=group))
        # A group numbers its processes by their ranks, and a mesh may have them in another order.
        by_rank = dict(zip(sorted(everyone), gathered, strict=True))
        return [by_rank[rank] for rank in everyone]

    @torch.no_grad()
    def share_with_replicas(self, tensors: Iterable[Tensor]) -> None:
        """Give all replicas of this stage the tensors of the first one."""
        group = self.connections.replicas
        if group is None:
            return
        first = self.place.ranks[self.place.stage][0]
        source = dist.get_group_rank(group, first)
        for tensor in tensors:
            self.watch.call(partial(share, tensor, group, source))

    def require_as_many_batches(self, has_batch: bool) -> None:
        """Raise an InputError if some replicas have a further batch and others have none."""
        group = self.connections.replicas_on_cpu
        if group is None:
            return
        count = torch.tensor([int(has_batch)], device="cpu")
        self.watch.call(lambda: dist.all_reduce(count, group=group))
        # The sum over the replicas.
        having = int(count)
        if having not in (0, group.size()):
            raise InputError(
                f"{having} of {group.size()} replicas have a further batch, and the others have "
                "none. Hint: give all loaders as many batches, as DistributedSampler does"
            )
