"""Which blocks each stage of a pipeline has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sffx.net import CutModel
from sffx.runtime.pipeline.balance import balanced, seconds_of_blocks
from sffx.runtime.pipeline.checks import given_cuts
from sffx.runtime.pipeline.ownership import inseparable, parts_of
from sffx.runtime.pipeline.ranks import Ranks
from sffx.runtime.stage import Stage, stages_of


@dataclass(frozen=True)
class Division:
    """The blocks of a cut model, divided among the stages of a pipeline.

    A stage of the pipeline has one or more stages of the model: a block with its head and its norm.

    Attributes:
        net: the cut model.
        begins: the index of the first block of each stage.
        seconds: what each block took when the stages were balanced, by name; empty where the user
            named the cuts.
    """

    net: CutModel
    begins: Sequence[int]
    seconds: dict[str, float] = field(default_factory=dict)

    def stages(self, index: int) -> list[Stage]:
        """Return the stages of the cut model that a stage of the pipeline has."""
        stages = stages_of(self.net)
        begin = self.begins[index]
        is_last = index == len(self.begins) - 1
        end = len(stages) if is_last else self.begins[index + 1]
        return list(stages[begin:end])

    def blocks(self) -> list[list[str]]:
        """Return the names of the blocks of each stage."""
        names = []
        for index in range(len(self.begins)):
            names.append([stage.name for stage in self.stages(index)])
        return names

    def parts(self) -> list[list[str]]:
        """Return the names of the modules that each stage owns."""
        total = len(stages_of(self.net))
        return [parts_of(self.stages(index), total) for index in range(len(self.begins))]


def divided(
    net: CutModel, cuts: Iterable[str] | None, example_input: Any, ranks: Ranks
) -> Division:
    """Divide the blocks of a cut model. All processes call it, and get the same division.

    Args:
        net: the cut model.
        cuts: the names of the blocks that begin the second stage and those after it; None to
            balance the stages by the time that each block takes.
        example_input: a batch to measure blocks with; None for random samples.
        ranks: the processes, connected. The first one measures.

    Raises:
        InputError: the cuts do not fit, or there are too few places to divide at.
        ProcessError: another process failed.
    """
    place = ranks.place
    tied = inseparable(net)
    names = [block.target for block in net.plan.all_blocks]
    if cuts is not None:
        return Division(net, given_cuts(cuts, names, place.stages, tied))
    seconds = None
    if place.rank == place.everyone[0]:
        seconds = seconds_of_blocks(net, example_input, ranks.device)
    measured = ranks.from_everyone(seconds)[0]
    begins = balanced(measured, place.stages, tied)
    return Division(net, begins, dict(zip(names, measured, strict=True)))
