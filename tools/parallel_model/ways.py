"""The ways to train a model on a cluster: time, bytes and memory of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sffx.runtime.pipeline.balance import balanced
from tools.parallel_model.counts import BlockCost
from tools.parallel_model.machines import Cluster
from tools.parallel_model.schedules import (
    Layers,
    LocalBlock,
    Step,
    by_microbatches,
    data_parallel,
    fully_sharded,
    local_data_parallel,
    local_pipeline,
)

DEPTH = 2
MICROBATCHES = (8, 16, 32, 64, 128)
# Parameters and AdamW's two moments, in sizes of the parameters.
KEPT = 3
# And gradients.
TRAINED = 4


@dataclass(frozen=True)
class Outcome:
    """What a way takes.

    Attributes:
        step: its time.
        sent: bytes that a device sends in a step, the busiest one.
        memory: bytes that a device holds, the fullest one.
        microbatches: of backpropagation in a pipeline, 0 elsewhere.
    """

    step: Step
    sent: float
    memory: float
    microbatches: int = 0


@dataclass(frozen=True)
class Setting:
    """A model on a cluster.

    Attributes:
        costs: of the model's blocks.
        cluster: the machines.
        samples: of a step, on all devices together.
    """

    costs: Sequence[BlockCost]
    cluster: Cluster
    samples: float

    @property
    def of_pipeline(self) -> float:
        """Samples of a step in one machine, which holds one pipeline."""
        return self.samples / self.cluster.machines

    @property
    def of_device(self) -> float:
        """Samples of a step on a device that holds the whole model."""
        return self.samples / self.cluster.all_devices

    def local(self, cost: BlockCost, samples: float, reduce: float = 0.0) -> LocalBlock:
        """Return the seconds of a block that learns from its own loss."""
        return LocalBlock(
            score=self.cluster.compute(cost.scoring, samples),
            learn=self.cluster.compute(cost.learning, samples),
            update=self.cluster.optimizer(cost.parameters + cost.head),
            reduce=reduce,
        )

    def layers(
        self, cost: BlockCost, samples: float, reduce: float = 0.0, gather: float = 0.0
    ) -> Layers:
        """Return the seconds of a block that learns by backpropagation."""
        shards = self.cluster.all_devices if gather else 1
        return Layers(
            forward=self.cluster.compute(cost.forward, samples),
            backward=self.cluster.compute(cost.backward, samples),
            update=self.cluster.optimizer(cost.parameters / shards),
            reduce=reduce,
            gather=gather,
        )

    def divided(self, seconds: Sequence[float]) -> list[Sequence[BlockCost]]:
        """Return the blocks of each device of a pipeline in one machine."""
        begins = balanced(seconds, self.cluster.devices, {})
        ends = [*begins[1:], len(self.costs)]
        return [self.costs[begin:end] for begin, end in zip(begins, ends, strict=True)]


def pipeline(setting: Setting) -> Outcome:
    """Return what `sffx.Pipeline` takes, with a replica in each machine."""
    cluster = setting.cluster
    samples = setting.of_pipeline
    alone = [setting.local(cost, samples) for cost in setting.costs]
    stages = setting.divided([each.score + each.learn + each.update for each in alone])
    blocks = []
    for costs in stages:
        own = []
        for cost in costs:
            reduce = cluster.all_reduce_between(cost.parameters + cost.head)
            own.append(setting.local(cost, samples, reduce))
        blocks.append(own)
    sizes = [costs[-1].given.at(samples) for costs in stages[:-1]]
    step = local_pipeline(blocks, [cluster.inside.seconds(size) for size in sizes], DEPTH)
    sent, memory = [], []
    for s, costs in enumerate(stages):
        given = sizes[s] if s < len(sizes) else 0.0
        received = sizes[s - 1] if s else 0.0
        parameters = sum(cost.parameters + cost.head for cost in costs)
        sent.append(given + _sums(parameters, cluster.machines))
        # One batch is worked on, and the receive of the next one is posted.
        on_the_way = DEPTH * given + 2 * received
        held = _held_locally(costs, samples, keeps_gradients=cluster.machines > 1)
        memory.append(held + on_the_way)
    return Outcome(step, max(sent), max(memory))


def replicate(setting: Setting, *, waits: bool) -> Outcome:
    """Return what `sffx.replicate` takes; or DDP around `LocalLoss`, which waits at the end."""
    samples = setting.of_device
    blocks = []
    for cost in setting.costs:
        reduce = setting.cluster.all_reduce(cost.parameters + cost.head)
        blocks.append(setting.local(cost, samples, reduce))
    step = local_data_parallel(blocks) if waits else local_pipeline([blocks])
    parameters = sum(cost.parameters + cost.head for cost in setting.costs)
    memory = _held_locally(setting.costs, samples, keeps_gradients=True)
    return Outcome(step, _sums(parameters, setting.cluster.all_devices), memory)


def ddp(setting: Setting) -> Outcome:
    """Return what DDP by backpropagation takes."""
    layers = []
    for cost in setting.costs:
        reduce = setting.cluster.all_reduce(cost.parameters)
        layers.append(setting.layers(cost, setting.of_device, reduce=reduce))
    parameters = sum(cost.parameters for cost in setting.costs)
    memory = TRAINED * parameters + _saved(setting.costs, setting.of_device)
    sent = _sums(parameters, setting.cluster.all_devices)
    return Outcome(data_parallel(layers), sent, memory)


def fsdp(setting: Setting) -> Outcome:
    """Return what FSDP2 takes, with a group for each block."""
    devices = setting.cluster.all_devices
    layers = []
    for cost in setting.costs:
        gather = setting.cluster.all_gather(cost.parameters)
        layers.append(setting.layers(cost, setting.of_device, gather=gather))
    parameters = sum(cost.parameters for cost in setting.costs)
    largest = max(cost.parameters for cost in setting.costs)
    # Two groups are gathered, and one has whole gradients.
    memory = TRAINED * parameters / devices + 3 * largest
    memory += _saved(setting.costs, setting.of_device)
    sent = 1.5 * _sums(parameters, devices)
    return Outcome(fully_sharded(layers), sent, memory)


def microbatched(setting: Setting, schedule: Literal["GPipe", "1F1B"]) -> Outcome:
    """Return what backpropagation in a pipeline takes, with the best number of microbatches.

    Each machine holds one pipeline.
    """
    outcomes = []
    for microbatches in MICROBATCHES:
        if microbatches <= setting.of_pipeline:
            outcomes.append(_microbatched(setting, schedule, microbatches))
    # The best of those that fit; if none does, the one that comes nearest.
    memory = setting.cluster.memory
    fitting = [each for each in outcomes if each.memory <= memory]
    if not fitting:
        return min(outcomes, key=_memory_of)
    return min(fitting, key=_seconds_of)


def _microbatched(
    setting: Setting, schedule: Literal["GPipe", "1F1B"], microbatches: int
) -> Outcome:
    cluster = setting.cluster
    samples = setting.of_pipeline / microbatches
    alone = [setting.layers(cost, samples) for cost in setting.costs]
    seconds = [(each.forward + each.backward) * microbatches + each.update for each in alone]
    stages = setting.divided(seconds)
    layers = []
    for costs in stages:
        own = []
        for cost in costs:
            reduce = cluster.all_reduce_between(cost.parameters)
            own.append(setting.layers(cost, samples, reduce=reduce))
        layers.append(own)
    sizes = [costs[-1].given.at(samples) for costs in stages[:-1]]
    transfers = [cluster.inside.seconds(size) for size in sizes]
    step = by_microbatches(layers, transfers, microbatches, schedule)
    sent, memory = [], []
    for s, costs in enumerate(stages):
        parameters = sum(cost.parameters for cost in costs)
        passed = microbatches * sum(sizes[max(0, s - 1) : s + 1])
        sent.append(passed + _sums(parameters, cluster.machines))
        in_flight = microbatches if schedule == "GPipe" else min(microbatches, len(stages) - s)
        memory.append(TRAINED * parameters + in_flight * _saved(costs, samples))
    return Outcome(step, max(sent), max(memory), microbatches)


def _seconds_of(outcome: Outcome) -> float:
    return outcome.step.seconds


def _memory_of(outcome: Outcome) -> float:
    return outcome.memory


def _sums(size: float, processes: int) -> float:
    """Return the bytes that a process sends for a sum over so many."""
    return 2 * (processes - 1) / processes * size


def _saved(costs: Sequence[BlockCost], samples: float) -> float:
    return sum(cost.saved.at(samples) for cost in costs)


def _held_locally(costs: Sequence[BlockCost], samples: float, *, keeps_gradients: bool) -> float:
    """Return the bytes of blocks that learn by themselves, while the largest one runs.

    Args:
        costs: of the blocks on a device.
        samples: of a batch.
        keeps_gradients: whether the gradients of other blocks are under way at that time.
    """
    parameters = sum(cost.parameters + cost.head for cost in costs)
    peaks = []
    for cost in costs:
        # The gradients of the block itself are among the bytes of its run.
        others = parameters - cost.parameters - cost.head if keeps_gradients else 0.0
        peaks.append(cost.running.at(samples) + others)
    # All heads read one copy of an output layer, and every block counts it.
    copies = max(cost.copies for cost in costs)
    return KEPT * parameters + copies + max(peaks)


def all_ways(
    by_layer: Sequence[BlockCost], by_stage: Sequence[BlockCost], cluster: Cluster, samples: float
) -> dict[str, Outcome]:
    """Return all ways by name.

    Args:
        by_layer: costs of the model with a head for each layer. Backpropagation uses its layers.
        by_stage: costs of the model with a head for each stage.
        cluster: the machines.
        samples: of a step, on all devices together.
    """
    fine = Setting(by_layer, cluster, samples)
    coarse = replace(fine, costs=by_stage)
    return {
        "pipeline, few heads": pipeline(coarse),
        "pipeline, many heads": pipeline(fine),
        "1F1B": microbatched(fine, "1F1B"),
        "GPipe": microbatched(fine, "GPipe"),
        "DDP": ddp(fine),
        "FSDP2": fsdp(fine),
        "DDP, local": replicate(coarse, waits=True),
        "replicate": replicate(coarse, waits=False),
    }
