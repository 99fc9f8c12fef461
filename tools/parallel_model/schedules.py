"""Steps of training as tasks on devices and links: what each way to train does, in its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tools.parallel_model.timeline import Timeline, Times


@dataclass(frozen=True)
class LocalBlock:
    """Seconds of a block that learns from its own loss.

    Attributes:
        score: forward, with head and norm.
        learn: backward through head and block.
        update: of the optimizer.
        reduce: of the sum of its gradients over replicas, 0 without replicas.
    """

    score: float
    learn: float
    update: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class Layers:
    """Seconds of some layers that learn by backpropagation.

    Attributes:
        forward: on a batch, or on a microbatch.
        backward: likewise.
        update: of the optimizer.
        reduce: of the sum of their gradients over replicas.
        gather: to gather their parameters, or to reduce and scatter their gradients.
    """

    forward: float
    backward: float
    update: float = 0.0
    reduce: float = 0.0
    gather: float = 0.0


@dataclass(frozen=True)
class Step:
    """A training step in steady state.

    Attributes:
        seconds: from one step to the next.
        busy: the share of it in which a device computes, the mean over the devices.
    """

    seconds: float
    busy: float


def local_pipeline(
    stages: Sequence[Sequence[LocalBlock]], transfers: Sequence[float] = (), depth: int = 2
) -> Step:
    """Return a step of blocks that learn by themselves, divided among devices, as sffx does it.

    A device sends what its last block gives before that block learns, and nothing comes back. With
    replicas, an optimizer steps just before its block runs again. One stage with `reduce` is
    `sffx.replicate`.

    Args:
        stages: the blocks of each device.
        transfers: seconds of each link between two devices.
        depth: so many batches may be on a link.
    """
    batches = 4 * len(stages) + 4 * depth + 8
    times = _local_times(stages, transfers, depth, batches)
    last_stage = len(stages) - 1
    last_block = len(stages[-1]) - 1
    half = batches // 2
    begin = times.ends["learned", last_stage, last_block, half - 1]
    end = times.ends["learned", last_stage, last_block, batches - 1]
    seconds = (end - begin) / (batches - half)
    computing = sum(b.score + b.learn + b.update for blocks in stages for b in blocks)
    return Step(seconds, computing / len(stages) / seconds)


def local_epoch(
    stages: Sequence[Sequence[LocalBlock]], transfers: Sequence[float], depth: int, batches: int
) -> float:
    """Return the seconds of some batches, from an empty pipeline to an empty one.

    Args:
        stages: as for `local_pipeline`.
        transfers: likewise.
        depth: likewise.
        batches: their number.
    """
    return _local_times(stages, transfers, depth, batches).end


def _local_times(
    stages: Sequence[Sequence[LocalBlock]], transfers: Sequence[float], depth: int, batches: int
) -> Times:
    timeline = Timeline()
    for k in range(batches):
        for s, blocks in enumerate(stages):
            _add_local_batch(timeline, s, k, blocks, transfers, depth)
    return timeline.run()


def _add_local_batch(
    timeline: Timeline,
    s: int,
    k: int,
    blocks: Sequence[LocalBlock],
    transfers: Sequence[float],
    depth: int,
) -> None:
    """Add what stage s does on batch k."""
    device = ("device", s)
    # The receive of the next batch is posted now.
    timeline.add(device, ("taken", s, k), 0.0, [("sent", s - 1, k)] if s else [])
    for i, block in enumerate(blocks):
        if block.reduce and k:
            reduced = [("reduced", s, i, k - 1)]
            timeline.add(device, ("updated", s, i, k - 1), block.update, reduced)
        timeline.add(device, ("scored", s, i, k), block.score)
        if i == len(blocks) - 1 and s < len(transfers):
            _add_sending(timeline, s, k, transfers[s], depth)
        update = 0.0 if block.reduce else block.update
        timeline.add(device, ("learned", s, i, k), block.learn + update)
        if block.reduce:
            timeline.add(("ring", s), ("reduced", s, i, k), block.reduce, [("learned", s, i, k)])


def _add_sending(timeline: Timeline, s: int, k: int, seconds: float, depth: int) -> None:
    """Add the sending of batch k from stage s to the next one."""
    oldest = [("sent", s, k - depth)] if k >= depth else []
    timeline.add(("device", s), ("handed", s, k), 0.0, oldest)
    posted = [("taken", s + 1, k - 1)] if k else []
    timeline.add(("link", s), ("sent", s, k), seconds, [("handed", s, k), *posted])


def by_microbatches(
    stages: Sequence[Sequence[Layers]],
    transfers: Sequence[float],
    microbatches: int,
    schedule: Literal["GPipe", "1F1B"],
) -> Step:
    """Return a step of backpropagation in a pipeline that is flushed at its end.

    Args:
        stages: the layers of each device, with the seconds of a microbatch.
        transfers: seconds of each link between two devices for a microbatch, either way.
        microbatches: M.
        schedule: "GPipe" runs all forwards first. "1F1B" runs a backward as soon as it can.
    """
    timeline = Timeline()
    for s, layers in enumerate(stages):
        warm_up = microbatches if schedule == "GPipe" else min(microbatches, len(stages) - s)
        for m in range(warm_up):
            _add_forward(timeline, s, m, layers, transfers)
        for m in range(microbatches):
            _add_backward(timeline, s, m, layers, transfers, is_last=m == microbatches - 1)
            if m + warm_up < microbatches:
                _add_forward(timeline, s, m + warm_up, layers, transfers)
        reduced = [("reduced", s, i) for i in range(len(layers))]
        timeline.add(("device", s), ("updated", s), sum(each.update for each in layers), reduced)
    return _step(timeline.run(), len(stages))


def _add_forward(
    timeline: Timeline, s: int, m: int, layers: Sequence[Layers], transfers: Sequence[float]
) -> None:
    received = [("sent", s - 1, m)] if s else []
    seconds = sum(each.forward for each in layers)
    timeline.add(("device", s), ("forward", s, m), seconds, received)
    if s < len(transfers):
        timeline.add(("link", s), ("sent", s, m), transfers[s], [("forward", s, m)])


def _add_backward(
    timeline: Timeline,
    s: int,
    m: int,
    layers: Sequence[Layers],
    transfers: Sequence[float],
    *,
    is_last: bool,
) -> None:
    waits = [("returned", s + 1, m)] if s < len(transfers) else []
    for i in reversed(range(len(layers))):
        timeline.add(("device", s), ("backward", s, m, i), layers[i].backward, waits)
        if is_last:
            ready = [("backward", s, m, i)]
            timeline.add(("ring", s), ("reduced", s, i), layers[i].reduce, ready)
    if s:
        ready = [("backward", s, m, 0)]
        timeline.add(("back", s), ("returned", s, m), transfers[s - 1], ready)


def data_parallel(layers: Sequence[Layers]) -> Step:
    """Return a step of DDP by backpropagation: sums begin in the backward pass, the last first."""
    return by_microbatches([layers], [], 1, "GPipe")


def local_data_parallel(blocks: Sequence[LocalBlock]) -> Step:
    """Return a step of DDP around `LocalLoss`: sums begin when all blocks have learned."""
    timeline = Timeline()
    computing = sum(each.score + each.learn for each in blocks)
    timeline.add(("device", 0), "learned", computing)
    for i, block in enumerate(blocks):
        timeline.add(("ring", 0), ("reduced", i), block.reduce, ["learned"])
    reduced = [("reduced", i) for i in range(len(blocks))]
    timeline.add(("device", 0), "updated", sum(each.update for each in blocks), reduced)
    return _step(timeline.run(), 1)


def fully_sharded(layers: Sequence[Layers]) -> Step:
    """Return a step of FSDP2: layers are gathered twice, the next one while one runs.

    The last layers are not gathered again. `update` is that of a device's share.
    """
    timeline = Timeline()
    order = [("forward", i) for i in range(len(layers))]
    order += [("backward", i) for i in reversed(range(len(layers)))]
    for number, (phase, i) in enumerate(order):
        # A gather begins when the part before the one before has run.
        before = [order[number - 2]] if number >= 2 else []
        is_there = phase == "backward" and i == len(layers) - 1
        gather = 0.0 if is_there else layers[i].gather
        timeline.add(("ring", 0), ("gathered", phase, i), gather, before)
        # Behind the gather that is made ahead of it.
        if number >= 2 and order[number - 2][0] == "backward":
            _add_scatter(timeline, layers, order[number - 2][1])
        seconds = getattr(layers[i], phase)
        timeline.add(("device", 0), (phase, i), seconds, [("gathered", phase, i)])
    for i in reversed(range(min(2, len(layers)))):
        _add_scatter(timeline, layers, i)
    scattered = [("scattered", i) for i in range(len(layers))]
    timeline.add(("device", 0), "updated", sum(each.update for each in layers), scattered)
    return _step(timeline.run(), 1)


def _add_scatter(timeline: Timeline, layers: Sequence[Layers], i: int) -> None:
    timeline.add(("ring", 0), ("scattered", i), layers[i].gather, [("backward", i)])


def _step(times: Times, devices: int) -> Step:
    computing = sum(times.busy["device", s] for s in range(devices))
    return Step(times.end, computing / devices / times.end)
