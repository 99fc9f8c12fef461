"""The steps of the optimizer on the blocks of one process of a pipeline."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from sffx.checks import positive_integer
from sffx.errors import InputError
from sffx.runtime.averaging import Averaging, averaged_buffers, copied_buffers
from sffx.runtime.gradients import Gradients
from sffx.runtime.learn import Learned
from sffx.runtime.optimizers import require_optimizer_of
from sffx.runtime.pipeline.watch import Watch
from sffx.runtime.stage import Stage
from sffx.runtime.step import Optimizers, optimizers_of_stages, require_all_learn
from sffx.runtime.update import Updates


class Steps:
    """Collects the gradients of each block, and lets the optimizer step when it is time.

    With replicas, the gradients of a block are averaged while other blocks run. The optimizer steps
    on the block just before it runs again.

    Args:
        stages: of this process.
        optimizer: of all its blocks, one for each, or None if nothing learns.
        accumulate: batches for a step.
        replicas: the processes that average their gradients, None if there is one.
        watch: waits for them.

    Raises:
        InputError: an argument does not fit, as for `local_step`.
    """

    def __init__(
        self,
        stages: list[Stage],
        optimizer: Optimizers | None,
        accumulate: int,
        replicas: dist.ProcessGroup | None,
        watch: Watch,
    ) -> None:
        self._stages = stages
        self._accumulate = positive_integer(
            "accumulate", accumulate, "a number of batches, 1 or more"
        )
        self._replicas = replicas
        self._watch = watch
        self._updates = _updates(stages, optimizer)
        self._collected: dict[Stage, Gradients] = {}
        self._batches: dict[Stage, int] = {}
        self._averaging: dict[Stage, Averaging] = {}
        # Gradients of before are not those of this epoch.
        for stage in stages:
            for parameter in stage.trainable:
                parameter.grad = None

    def before(self, stage: Stage) -> None:
        """Bring a stage up to date before it runs."""
        averaging = self._averaging.pop(stage, None)
        if averaging is not None:
            gradients = averaging.wait(lambda work: self._watch.wait([work]))
            self._apply(stage, gradients)

    def after(self, learned: Learned) -> None:
        """Take the gradients of a stage, and step if they are those of enough batches."""
        stage = learned.stage
        if stage not in self._updates:
            return
        collected = self._collected.setdefault(stage, {})
        for parameter, gradient in learned.gradients.items():
            earlier = collected.get(parameter)
            collected[parameter] = gradient if earlier is None else earlier.add_(gradient)
        # The caller still holds `learned`, and would hold its gradients as well.
        learned.gradients.clear()
        self._batches[stage] = self._batches.get(stage, 0) + 1
        if self._batches[stage] == self._accumulate:
            self._step(stage)

    def finish(self) -> None:
        """Step on all gradients, though they be of fewer batches, and wait for the replicas."""
        for stage in list(self._collected):
            self._step(stage)
        for stage in self._stages:
            # A frozen block has no gradients, but it may still have running statistics.
            if self._replicas is not None and stage not in self._updates:
                self._average(stage, {}, self._replicas)
            self.before(stage)

    def _step(self, stage: Stage) -> None:
        gradients = self._collected.pop(stage)
        batches = self._batches.pop(stage)
        if batches > 1 and gradients:
            torch._foreach_div_(list(gradients.values()), batches)
        if self._replicas is None:
            self._apply(stage, gradients)
        else:
            self._average(stage, gradients, self._replicas)

    def _average(self, stage: Stage, gradients: Gradients, replicas: dist.ProcessGroup) -> None:
        self._averaging[stage] = Averaging(
            stage.trainable,
            gradients,
            replicas,
            averaged=averaged_buffers(stage.modules),
            copied=copied_buffers(stage.modules),
        )

    def _apply(self, stage: Stage, gradients: Gradients) -> None:
        if gradients:
            self._updates[stage].apply(gradients)


def _updates(stages: list[Stage], optimizer: Optimizers | None) -> dict[Stage, Updates]:
    """Return what steps on each stage."""
    learning = [stage for stage in stages if stage.trainable]
    if not learning:
        return {}
    if optimizer is None:
        raise InputError(
            f"optimizer is None, but {learning[0].name} has parameters to train. "
            "Hint: torch.optim.AdamW(pipe.parameter_groups(lr=1e-3))"
        )
    by_name: dict[str, Optimizer] = optimizers_of_stages(learning, optimizer)
    own = {parameter for stage in learning for parameter in stage.trainable}
    updates: dict[Optimizer, Updates] = {}
    for each in dict.fromkeys(by_name.values()):
        require_optimizer_of(each, own, "pipe.parameter_groups(lr)")
        updates[each] = Updates(each)
    require_all_learn(learning, by_name)
    return {stage: updates[by_name[stage.name]] for stage in learning}
