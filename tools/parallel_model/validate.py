"""The model against measured runs: two processes on a CPU, by `python -m tools.pipeline`."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from tools.parallel_model.machines import Link
from tools.parallel_model.schedules import (
    Layers,
    LocalBlock,
    by_microbatches,
    data_parallel,
    local_data_parallel,
    local_epoch,
    local_pipeline,
)
from tools.parallel_model.ways import DEPTH

# What gloo reaches between two processes of one machine.
LOOPBACK = Link(bandwidth=1e9, latency=2e-4)
# As in the measurement.
MICROBATCHES = 4
# The share of the forward pass in a step.
FORWARD = 1 / 3


@dataclass(frozen=True)
class Prediction:
    """Images a second of a way, as predicted and as measured."""

    way: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Run:
    """What was measured of one way to train.

    Attributes:
        cpu: seconds of each process for a batch.
        sent: bytes that a process sends for a batch.
        blocks: how many blocks the model has.
        batches: without a pause.
    """

    cpu: list[float]
    sent: float
    blocks: int
    batches: int

    @property
    def busier(self) -> float:
        return max(self.cpu)

    def local_blocks(self, *, reduces: bool) -> list[LocalBlock]:
        """Return the step of a process, divided into equal blocks."""
        seconds = self.busier / self.blocks
        reduce = LOOPBACK.seconds(self.sent / self.blocks) if reduces else 0.0
        return [LocalBlock(FORWARD * seconds, (1 - FORWARD) * seconds, 0.0, reduce)] * self.blocks

    def layers(self) -> list[Layers]:
        """Return the same for backpropagation."""
        return [
            Layers(each.score, each.learn, reduce=each.reduce)
            for each in self.local_blocks(reduces=True)
        ]


def predictions(record: dict[str, Any]) -> list[Prediction]:
    """Return what the model predicts of one workload, beside what was measured.

    Args:
        record: of the workload, from record.json of `tools.pipeline`.
    """
    found = []
    blocks = len(record["seconds_of_blocks"])
    for way, of_first in record["found"][0].items():
        of_way = [each[way] for each in record["found"]]
        cpu = [median(each["cpu"]) for each in of_way]
        sent = max(each["sent"] for each in of_way)
        seconds = _seconds(way, Run(cpu, sent, blocks, record["batches"]))
        samples = record["samples"]
        found.append(Prediction(way, samples / seconds, samples / median(of_first["seconds"])))
    return found


def _seconds(way: str, run: Run) -> float:
    """Return the predicted seconds of a batch."""
    if way == "pipeline":
        stages = [[LocalBlock(FORWARD * each, (1 - FORWARD) * each)] for each in run.cpu]
        seconds = local_epoch(stages, [LOOPBACK.seconds(run.sent)], DEPTH, run.batches)
        return seconds / run.batches
    if way in ("GPipe", "1F1B"):
        schedule: Literal["GPipe", "1F1B"] = "GPipe" if way == "GPipe" else "1F1B"
        of_microbatch = [each / MICROBATCHES for each in run.cpu]
        layers = [[Layers(FORWARD * each, (1 - FORWARD) * each)] for each in of_microbatch]
        transfers = [LOOPBACK.seconds(run.sent / MICROBATCHES)]
        return by_microbatches(layers, transfers, MICROBATCHES, schedule).seconds
    if way == "DDP, BP":
        return data_parallel(run.layers()).seconds
    if way == "DDP, local":
        return local_data_parallel(run.local_blocks(reduces=True)).seconds
    if way == "replicate":
        return local_pipeline([run.local_blocks(reduces=True)]).seconds
    return run.busier
