"""Where the parameters of a cut model are while its stages run.

There are four residencies, and a training step treats them alike. The parameters are on the
device (`Residency` itself), in host memory (`sffx.runtime.offload`), spread over processes
(`sffx.runtime.shard`), or the same in all processes (`sffx.runtime.replicate`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sffx.errors import InputError
from sffx.runtime.gradients import Gradients, block_gradients
from sffx.runtime.optimizers import require_optimizers_of
from sffx.runtime.stage import Stage
from sffx.runtime.update import Updates
from sffx.tensors import WITHOUT_VALUES


class Residency:
    """All parameters are on the device, all the time."""

    def __init__(self, net: fx.GraphModule) -> None:
        self.net = net

    @property
    def device(self) -> torch.device:
        """The device that the stages run on, where inputs must be.

        Raises:
            InputError: the parameters are on the meta device.
        """
        device = next(self.net.parameters()).device
        if device.type == "meta":
            raise InputError(f"net is on the meta device, without values. {WITHOUT_VALUES}")
        return device

    def prepare(self) -> None:
        """Make the model ready for a block-local step. Here there is nothing to do.

        Raises:
            InputError: it cannot be trained block by block as it is.
        """

    @property
    def agrees(self) -> bool:
        """Whether processes tell each other what they are about to do."""
        return False

    @property
    def heads_run_always(self) -> bool:
        """Whether a head runs with its block even where nobody asks for its scores."""
        return False

    def enter(self, stage: Stage, following: Stage | None) -> None:
        """Have the parameters of a stage that is about to run.

        Args:
            stage: that runs now.
            following: that runs after it, if any does.
        """

    def scoring(self) -> None:
        """Be ready to compute the scores of a batch."""

    def agree(self, action: str) -> None:
        """Wait until all processes do the same thing. Here each works for itself.

        Args:
            action: a key of `sffx.runtime.agreement.ACTIONS`.
        """

    @contextmanager
    def learning(self, stages: Sequence[Stage], action: str) -> Iterator[None]:
        """Hold a context in which stages learn.

        Args:
            stages: that learn.
            action: a key of `sffx.runtime.agreement.ACTIONS`.
        """
        yield

    @contextmanager
    def training_step(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """Hold a context for one `local_step`.

        Raises:
            InputError: an optimizer does not fit the model.
        """
        require_optimizers_of(self.net, optimizers)
        if _several_processes():
            warnings.warn(
                "local_step does not average gradients over processes. "
                "Hint: sffx.replicate(net), or DistributedDataParallel(sffx.LocalLoss(net))",
                stacklevel=4,  # the caller of local_step
            )
        yield

    def gradients(
        self, start: Tensor, parameters: list[nn.Parameter], gradient: Tensor | None
    ) -> Gradients:
        """Return the gradients of a stage's loss by parameter; its graph is freed.

        Args:
            start: the loss, or what the loss was computed from.
            parameters: of the stage.
            gradient: of the loss by `start`; None for 1.
        """
        return block_gradients(start, parameters, gradient)

    def collect(self, stage: Stage, gradients: Gradients) -> Collected:
        """Return a stage's gradients as they are handed to `backward`, maybe still on their way."""
        return Arrived(gradients)

    def update(self, stage: Stage, gradients: Gradients, updates: Updates | None) -> None:
        """Let an optimizer step on a stage, now or before the stage is next read.

        Args:
            stage: that has learnt.
            gradients: of its parameters. They are let go of.
            updates: of its optimizer, None if it has none.
        """
        if gradients and updates is not None:
            updates.apply(gradients)
        gradients.clear()

    def release(self, stage: Stage, *, changed: bool) -> None:
        """Let go of a stage that has run and, in training, has learnt. Here it stays.

        Args:
            stage: that is done.
            changed: whether its parameters may have changed.
        """


class Collected(Protocol):
    """Gradients that may still be on their way."""

    def wait(self) -> Gradients:
        """Return them when they are there."""
        ...


@dataclass(frozen=True)
class Arrived:
    """Gradients that are there already."""

    gradients: Gradients

    def wait(self) -> Gradients:
        """Return them."""
        return self.gradients


def _several_processes() -> bool:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size() > 1
