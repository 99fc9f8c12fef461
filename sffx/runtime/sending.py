"""One stage's gradients and buffers: to be sent, on their way, or to be applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sffx.runtime.averaging import Averaging, Wait, averaged_buffers, copied_buffers
from sffx.runtime.gradients import Gradients, mark_gradients
from sffx.runtime.options import Options
from sffx.runtime.stage import Stage
from sffx.runtime.update import Updates


class Sending:
    """The gradients and buffers of one stage, and the update that they are for.

    Attributes:
        stage: whose they are.
        step: the number of the step that they are of.
        parameters: of the stage that learn.
        norms: that ran before the stage, whose buffers are sent along.
    """

    def __init__(
        self,
        stage: Stage,
        step: int,
        gradients: Gradients,
        updates: Updates | None = None,
        norms: Sequence[nn.Module] = (),
    ) -> None:
        self.stage = stage
        self.step = step
        self.norms = norms
        self.parameters = stage.trainable if torch.is_grad_enabled() else []
        self._gradients = gradients
        self._averaging: Averaging | None = None
        self._updates = updates
        self._options: Options | None = None
        if updates is not None:
            self._options = updates.options(self.parameters)
            updates.announce()

    def start(self, group: dist.ProcessGroup) -> None:
        """Send the gradients and buffers, and let go of this process's own gradients."""
        modules = [*self.norms, *self.stage.modules]
        averaged = averaged_buffers(modules)
        copied = copied_buffers(modules)
        self._averaging = Averaging(self.parameters, self._gradients, group, averaged, copied)
        mark_gradients(self.tensors)
        self._gradients = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is on its way: flat tensors, as large as the gradients and running statistics."""
        return [] if self._averaging is None else self._averaging.tensors

    def wait(self, wait: Wait | None) -> Gradients:
        """Return the mean gradients, and set the buffers.

        Args:
            wait: how to wait for a collective; its own `wait` if None.
        """
        assert self._averaging is not None  # The caller has sent it.
        gradients = self._averaging.wait(wait)
        self._averaging = None
        return gradients

    def apply(self, wait: Wait | None) -> None:
        """Wait for the mean gradients, and let the optimizer step on the stage."""
        gradients = self.wait(wait)
        if gradients and self._updates is not None:
            self._updates.apply(gradients, self._options)


def norms_before(stages: Sequence[Stage]) -> list[list[nn.Module]]:
    """Return, for each stage that learns in a step, the norms that are sent with it.

    A norm runs after its own stage has sent, so its buffers go with the next stage that learns. The
    norm behind the last one does not run.

    Args:
        stages: that learn, in order.
    """
    norms: list[list[nn.Module]] = [[]]
    for stage in stages:
        norms.append(stage.norms)
    return norms[: len(stages)]


def layout_of(stage: Stage, norms: Sequence[nn.Module]) -> list[Any]:
    """Return what must be the same in all processes for their sums to fit together.

    Args:
        stage: that learns.
        norms: whose buffers are sent with it.
    """
    layout: list[Any] = [stage.name, torch.is_grad_enabled()]
    modules = [*norms, *stage.modules]
    for tensor in (*stage.trainable, *averaged_buffers(modules), *copied_buffers(modules)):
        layout.append((tuple(tensor.shape), str(tensor.dtype)))
    return layout
