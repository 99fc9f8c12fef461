"""Where each process stands in a pipeline: its stage, its replica, and its connections."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sffx.checks import positive_integer
from sffx.errors import InputError
from sffx.runtime.agreement import require_processes
from sffx.runtime.groups import new_group
from sffx.runtime.pipeline.link import Groups

# Watch ends a wait that takes too long, and names who is at fault. Torch's own timeout names
# nobody, so it comes later.
_NEVER = timedelta(days=30)


@dataclass(frozen=True)
class Place:
    """The place of this process among the ranks of a pipeline.

    Attributes:
        ranks: by stage, then by replica.
        rank: of this process.
        stage: of this process.
        replica: of this process.
    """

    ranks: tuple[tuple[int, ...], ...]
    rank: int
    stage: int
    replica: int

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.ranks)

    @property
    def replicas(self) -> int:
        """The number of replicas of each stage."""
        return len(self.ranks[0])

    @property
    def everyone(self) -> list[int]:
        """All ranks, those of the first stage first."""
        return [rank for stage in self.ranks for rank in stage]

    @property
    def first(self) -> bool:
        """Whether this process is in the first stage, which has the loader."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this process is in the last stage."""
        return self.stage == self.stages - 1


def find_place(group: dist.ProcessGroup | DeviceMesh | None, replicas: int | None) -> Place:
    """Return the place of this process.

    Args:
        group: the processes of the pipeline, all if None; or a mesh with the axes stage and
            replica.
        replicas: of each stage, 1 if None.

    Raises:
        InputError: there are no processes, or they do not divide into replicas, or this process is
            not among them.
    """
    require_processes(None)
    rank = dist.get_rank()
    ranks = _ranks(group, replicas)
    for stage, row in enumerate(ranks):
        if rank in row:
            return Place(ranks, rank, stage, row.index(rank))
    raise InputError(
        f"rank {rank} is not in the group of the pipeline, {ranks}. "
        "Hint: make the pipeline only in the processes of its group"
    )


def _ranks(
    group: dist.ProcessGroup | DeviceMesh | None, replicas: int | None
) -> tuple[tuple[int, ...], ...]:
    """Return the ranks by stage, then by replica."""
    if isinstance(group, DeviceMesh):
        if group.ndim > 2 or replicas is not None:
            raise InputError(
                f"group is a mesh of {group.ndim} axes and replicas is {replicas}. "
                "Hint: a mesh with the axes stage and replica, and no replicas="
            )
        table = group.mesh.reshape(len(group.mesh), -1).tolist()
        return tuple(map(tuple, table))
    everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
    width = 1
    if replicas is not None:
        width = positive_integer("replicas", replicas, "a number of replicas, 1 or more")
    if len(everyone) % width:
        raise InputError(
            f"{len(everyone)} processes do not divide into {width} replicas. "
            f"Hint: start {width} processes for each stage"
        )
    starts = range(0, len(everyone), width)
    return tuple(tuple(everyone[start : start + width]) for start in starts)


@dataclass(frozen=True)
class Connections:
    """The process groups of one process.

    Attributes:
        everyone: all ranks of the pipeline, on the CPU.
        replicas: the ranks of this stage, None if there is one.
        replicas_on_cpu: the same ranks, for small messages.
        upstream: to the stage before, None for the first stage.
        downstream: to the stage behind, None for the last stage.
    """

    everyone: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    replicas_on_cpu: dist.ProcessGroup | None
    upstream: Groups | None
    downstream: Groups | None


def connect(place: Place, device: torch.device) -> Connections:
    """Make the process groups of this process. All ranks of the pipeline must call it.

    Args:
        place: of this process.
        device: that it computes on.
    """
    everyone = _group(place.everyone)
    own_stage = list(place.ranks[place.stage])
    on_cpu = on_device = None
    if place.replicas > 1:
        on_cpu = on_device = _group(own_stage)
    links: dict[int, dist.ProcessGroup] = {}
    if device.type != "cpu":
        on_device = _group(own_stage, device) if place.replicas > 1 else None
        links = _link_groups(place, device)
    upstream = None
    if not place.first:
        data = links.get(place.stage - 1, everyone)
        upstream = Groups(_neighbour(place, -1), everyone, data, device)
    downstream = None
    if not place.last:
        data = links.get(place.stage, everyone)
        downstream = Groups(_neighbour(place, 1), everyone, data, device)
    return Connections(everyone, on_device, on_cpu, upstream, downstream)


def _neighbour(place: Place, offset: int) -> int:
    """Return the rank in the stage before (-1) or behind (1)."""
    return place.ranks[place.stage + offset][place.replica]


def _link_groups(place: Place, device: torch.device) -> dict[int, dist.ProcessGroup]:
    """Return a group for each link of this process, by the stage at its upper end.

    On GPUs each link has a communicator of its own, so that no link waits for another one.
    """
    links: dict[int, dist.ProcessGroup] = {}
    replica = place.replica
    # First the links behind stages of even number, then the others, so that nobody waits in a ring.
    # Stage 2 makes link 2-3 while stages 0 and 1 make link 0-1, and then stages 1 and 2 make 1-2.
    for parity in (0, 1):
        # A stage is at the upper end of one of its links, and at the lower end of the other one.
        upper = place.stage if place.stage % 2 == parity else place.stage - 1
        lower = upper + 1
        if upper < 0 or lower == place.stages:
            continue
        ends = [place.ranks[upper][replica], place.ranks[lower][replica]]
        links[upper] = _group(ends, device)
    return links


def _group(ranks: list[int], device: torch.device | None = None) -> dist.ProcessGroup:
    """Return a group of its own for some ranks, on the CPU if no device is given."""
    return new_group(ranks, _NEVER, "gloo" if device is None else None)
