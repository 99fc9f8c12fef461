"""How the blocks of one process of a pipeline learn in an epoch."""

from __future__ import annotations

from collections.abc import Mapping

from sffx.runtime.learn import Lesson, learn_stage
from sffx.runtime.pipeline.epoch import Batch, Epoch
from sffx.runtime.pipeline.forward import Forward
from sffx.runtime.pipeline.losses import LossSums
from sffx.runtime.pipeline.steps import Steps
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage


class Training:
    """Learns from batches.

    Args:
        forward: runs the stages.
        lessons: how each stage of this process learns, if it does.
        steps: of the optimizer.
        residency: of the model.

    Attributes:
        sums: the losses so far.
    """

    def __init__(
        self,
        forward: Forward,
        lessons: Mapping[Stage, Lesson],
        steps: Steps,
        residency: Residency,
    ) -> None:
        self._forward = forward
        self._lessons = lessons
        self._steps = steps
        self._residency = residency
        self.sums = LossSums([stage.name for stage in lessons])

    def learn(self, batch: Batch, epoch: Epoch) -> None:
        """Learn from a batch stage by stage, and send what the next process reads of it."""
        for stage in epoch.stages:
            is_last = stage is epoch.stages[-1]
            if stage in self._lessons:
                self._learn_stage(stage, batch, epoch if is_last else None)
                continue
            self._forward.pass_through(stage, batch.values)
            if is_last:
                epoch.send(batch)
        self.sums.samples += batch.samples

    def _learn_stage(self, stage: Stage, batch: Batch, sends: Epoch | None) -> None:
        """Learn from a batch in one stage.

        Args:
            stage: that learns.
            batch: whose values the stage reads; gets its output.
            sends: the epoch by which the output goes on to the next process, for the last stage of
                this one.
        """
        self._steps.before(stage)
        held = [self._forward.scores(stage, batch.values)]
        # The next process begins while this one learns.
        if sends is not None:
            stage.hand_on(batch.values)
            sends.send(batch)
        learned = learn_stage(stage, held, batch.y, self._lessons[stage], self._residency)
        self.sums.add(stage.name, learned.loss, batch.samples)
        self._steps.after(learned)
        if sends is None:
            stage.hand_on(batch.values)
