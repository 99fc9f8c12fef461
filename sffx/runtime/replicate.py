"""Train the same cut model in several processes, each on samples of its own.

A block's gradients are averaged over the processes while other blocks run. The block's optimizer
steps just before the block is read again: when it runs in the next step, or for a state dict.

    step t      run block 0, send its gradients, run block 1, send its gradients, ...
    step t + 1  receive block 0's mean gradients, step, run block 0, send its gradients, ...

So the processes compute what they would compute if each waited for the others at every block, to
the bit. Between two steps a process holds the gradients of all blocks once, in flat tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sffx.checks import positive_time
from sffx.errors import InputError, ProcessError
from sffx.fsdp import shards_in
from sffx.learning.shared_output import OutputCopy
from sffx.net import plan_of, require_blocks_uncompiled
from sffx.runtime.agreement import Agreement, Word, require_processes, require_same, structure_of
from sffx.runtime.averaging import Wait
from sffx.runtime.gate import Gate, none
from sffx.runtime.gradients import Gradients
from sffx.runtime.groups import new_group, share
from sffx.runtime.offload import offloading_of
from sffx.runtime.optimizers import require_optimizers_of
from sffx.runtime.residency import Collected, Residency
from sffx.runtime.sending import Sending, layout_of, norms_before
from sffx.runtime.stage import Stage, stages_of
from sffx.runtime.update import Updates

_ATTRIBUTE = "replication"


def replicate(
    net: fx.GraphModule,
    group: dist.ProcessGroup | None = None,
    *,
    timeout: timedelta | float = 600.0,
) -> None:
    """Make a cut model the same in all processes, and average its gradients from now on.

    Every process must call it, after `torch.distributed.init_process_group`. Weights and buffers
    become those of the group's first process. Then `local_step` and `local_loss` average each
    block's gradients over the processes, as `DistributedDataParallel` does. So do the running
    statistics of batch norms. Other buffers become those of the first process.

    `local_step` does not wait for the averages. A block's optimizer steps just before the block is
    read again: in the next step, by `evaluate`, another forward, `state_dict`, `parameters`, a copy
    or an export. It steps with the learning rate and other options that held when the gradients
    were computed. The result is exactly that of waiting at each block. The price is memory: between
    two steps the gradients of all blocks are held once. Whoever holds a parameter itself, and not
    the net, sees it before the step; `finish` applies all.

    A process that fails ends the others with an error, and so do loaders of different length: at
    the next step, `finish` or `evaluate(..., group=...)`. `extract`, copies and pickles are not
    replicated.

    Args:
        net: what `transform` returned, cut in the same way in every process.
        group: the processes, all if None.
        timeout: how long a process waits for the others, in seconds or as a timedelta.

    Raises:
        InputError: there are no processes, or this one is not in `group`; `net` is no cut model, is
            replicated, offloaded or sharded already, has parameters on the meta device or
            embeddings with sparse gradients; or the nets of the processes differ.
    """
    plan_of(net)
    require_blocks_uncompiled(net, "sffx.replicate")
    present = replication_of(net)
    if present is not None and present.is_sound:
        raise InputError("net is replicated already. Hint: call sffx.replicate once")
    if offloading_of(net) is not None or shards_in(net):
        raise InputError(
            "net is offloaded or sharded, and replicas hold all parameters on the device. "
            "Hint: sffx.onload(net) first, or a net that was not sharded"
        )
    require_processes(group)
    wait = positive_time("timeout", timeout)
    if present is not None:
        present.leave()
        delattr(net, _ATTRIBUTE)
    agreement = Agreement(dist.get_process_group_ranks(group), wait)
    problem = _why_not_averageable(net)
    require_same(structure_of(net), agreement.group, problem)
    replication = Replication(net, agreement, _group_for_gradients(group, agreement, wait))
    replication.broadcast()
    setattr(net, _ATTRIBUTE, replication)
    replication.put_gates()


def replication_of(net: nn.Module) -> Replication | None:
    """Return how a model is replicated, None where it is not."""
    return getattr(net, _ATTRIBUTE, None)


class Replication(Residency):
    """The parameters are the same in all processes, and updates may be pending.

    Attributes:
        agreement: in which the processes say what they are about to do.
        group: over which gradients are averaged. No other collective runs in it.
        wait: how to wait for a collective of that group; its own `wait` if None.
    """

    def __init__(self, net: fx.GraphModule, agreement: Agreement, group: dist.ProcessGroup) -> None:
        super().__init__(net)
        self.agreement = agreement
        self.group = group
        self._stages = stages_of(net)
        self.wait: Wait | None = agreement.wait if group is agreement.group else None
        self._loads = 0  # state dicts that were loaded
        self._is_learning = False  # in a step or a loss
        self._is_settling = False
        # The norms whose buffers are sent with a stage of this step, by the stage's index.
        self._norms_before: dict[int, list[nn.Module]] = {}
        self._announcement: Word | None = None  # from when a step begins until a block runs
        # Gradients that wait for the others' word, and updates that wait for their gradients, in
        # the order in which they were computed. An update may be in both.
        self._unsent: list[Sending] = []
        self._pending: list[Sending] = []
        self._failure = ""  # of this process or of another one
        self._is_incomplete = False  # whether an update was lost in the middle of a step
        self._hooks: list[Any] = []
        self._optimizers: set[Optimizer] = set()

    @property
    def device(self) -> torch.device:
        """The device that the stages run on."""
        # Not by `net.parameters`, which settles.
        modules = [module for stage in self._stages for module in stage.modules]
        return next(p.device for module in modules for p in module.parameters())

    @property
    def agrees(self) -> bool:
        """Whether processes tell each other what they are about to do."""
        return True

    @property
    def is_sound(self) -> bool:
        """Whether no process is known to have failed."""
        return not self._failure

    def broadcast(self) -> None:
        """Make parameters and buffers those of the first process."""
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            share(tensor, self.group)

    def put_gates(self) -> None:
        """Put gates before the forwards of the blocks and of the norms between them."""
        for stage in self._stages:
            for module in stage.modules:
                gate = Gate(self._before_forward, stage.index)
                self._hooks.append(module.register_forward_pre_hook(gate))
            for norm in stage.norms:
                gate = Gate(self._before_norm, stage.index)
                self._hooks.append(norm.register_forward_pre_hook(gate))

    def leave(self) -> None:
        """Remove the gates and hooks, and drop what is pending."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._unsent.clear()
        self._pending.clear()

    # In a step.

    @contextmanager
    def learning(self, stages: Sequence[Stage], action: str) -> Iterator[None]:
        """Hold a context in which stages learn and send their gradients.

        An error tells the other processes, unless it comes before this one takes part.

        Raises:
            ProcessError: another process failed, or does something else.
        """
        self._require_sound()
        # A number in the place of the layouts, which are long.
        layouts = []
        self._norms_before = {}
        for stage, norms in zip(stages, norms_before(stages), strict=True):
            layouts.append(layout_of(stage, norms))
            self._norms_before[stage.index] = norms
        detail = zlib.crc32(repr(layouts).encode())
        self._announcement = Word(action, self.agreement.steps + 1, detail, self._loads)
        self._is_learning = True
        try:
            yield
            self._announce()
            self._send(block=True)
        except BaseException as error:
            # A word that is still there has not been sent.
            if self._announcement is None:
                self._fail(error)
            raise
        finally:
            self._announcement = None
            self._is_learning = False

    @contextmanager
    def training_step(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """Hold a context for one `local_step`."""
        require_optimizers_of(self.net, optimizers)
        for optimizer in optimizers:
            self._watch(optimizer)
        yield

    def collect(self, stage: Stage, gradients: Gradients) -> Collected:
        """Send the gradients of a stage, and return what waits for their mean."""
        sending = self._sending(stage, gradients)
        self._unsent.append(sending)
        self._send(block=False)
        return _Collected(self, sending)

    def update(self, stage: Stage, gradients: Gradients, updates: Updates | None) -> None:
        """Send the gradients of a stage, which is updated before it is next read."""
        sending = self._sending(stage, dict(gradients), updates)
        gradients.clear()
        self._unsent.append(sending)
        self._pending.append(sending)
        self._send(block=False)

    def _sending(
        self, stage: Stage, gradients: Gradients, updates: Updates | None = None
    ) -> Sending:
        norms = self._norms_before.get(stage.index, ())
        return Sending(stage, self.agreement.steps, gradients, updates, norms)

    def _announce(self) -> None:
        """Tell the others about this step, once."""
        if self._announcement is None:
            return
        word = self._announcement
        self._announcement = None
        self.agreement.steps += 1
        self.agreement.start(word)

    def _send(self, *, block: bool) -> None:
        """Send the gradients that wait, if all processes are known to send the same.

        Args:
            block: whether to wait until it is known.
        """
        if not self.agreement.reached(block=block):
            return
        while self._unsent:
            self._unsent.pop(0).start(self.group)

    # Between the steps.

    @torch.inference_mode(False)
    @torch.enable_grad()
    def settle(self, stage: Stage | None = None) -> None:
        """Apply the updates that a stage waits for, and those before them; all if None.

        Raises:
            ProcessError: an update was lost, since another process failed.
        """
        if self._is_settling or not (self._pending or self._is_incomplete):
            return
        if self._is_incomplete:
            raise ProcessError(
                f"the weights are those in the middle of step {self.agreement.steps}: "
                f"{self._failure}. Hint: load the newest checkpoint in all processes and call "
                "sffx.replicate again"
            )
        self._is_settling = True
        try:
            with self.failing():
                self._apply_first(self._number_to_settle(stage))
        finally:
            self._is_settling = False

    def _apply_first(self, number: int) -> None:
        """Apply the first of the pending updates."""
        # A step sends all before it ends. But it may itself read what it has changed: a parameter
        # that belongs to two blocks.
        if number and self._unsent:
            self._send(block=True)
        for _ in range(number):
            # It counts as pending until it is applied, since an error may come in between.
            self._pending[0].apply(self.wait)
            self._pending.pop(0)

    def settle_for_reader(self) -> None:
        """Apply all pending updates, unless it is a step that prepares itself."""
        is_preparing = self._announcement is not None
        if not is_preparing:
            self.settle()

    def forget(self) -> None:
        """Settle before a state dict is loaded. Updates that were lost do not matter then."""
        self._loads += 1
        if self._is_incomplete:
            self._pending.clear()
            self._is_incomplete = False
        self.settle_for_reader()

    def agree(self, action: str) -> None:
        """Apply all pending updates, and wait until all processes do the same thing.

        Raises:
            ProcessError: another process failed, or does something else.
        """
        self._require_sound()
        self.settle()
        with self.failing():
            self.agreement.require(Word(action, self.agreement.steps, loads=self._loads))

    def _number_to_settle(self, stage: Stage | None) -> int:
        """Return how many of the pending updates must be applied before a stage is read.

        Updates are applied in the order in which they were computed.
        """
        if stage is None:
            return len(self._pending)
        read: set[nn.Parameter] = set()
        for module in stage.modules:
            read.update(module.parameters())
            for part in module.modules():
                if isinstance(part, OutputCopy):
                    read.update(part.about_to_copy())
        number = 0
        for position, sending in enumerate(self._pending):
            # Stages may share parameters.
            if sending.stage.index == stage.index or not read.isdisjoint(sending.parameters):
                number = position + 1
        return number

    def _before_forward(self, index: int) -> None:
        """Update a stage whose module is about to run.

        Raises:
            InputError: its parameters would get gradients that nobody averages.
        """
        stage = self._stages[index]
        if self._is_learning:
            self._announce()
        elif torch.is_grad_enabled() and stage.block.training and stage.trainable:
            raise InputError(
                "net is replicated, and only local_step and local_loss average its gradients. "
                "Hint: torch.no_grad() around what only asks for scores"
            )
        if self._pending:
            self.settle(stage)

    def _before_norm(self, index: int) -> None:
        """Set the buffers of the norms behind a stage, which may still be on their way."""
        norms = self._stages[index].norms
        for sending in list(self._pending):
            if any(norm in norms for norm in sending.norms):
                self.settle(sending.stage)

    def _watch(self, optimizer: Optimizer) -> None:
        """Settle before an optimizer's state is saved or loaded."""
        if optimizer in self._optimizers:
            return
        self._optimizers.add(optimizer)
        for register in ("register_state_dict_pre_hook", "register_load_state_dict_pre_hook"):
            # A wrapper that is no torch optimizer itself may lack them.
            if hasattr(optimizer, register):
                hook = getattr(optimizer, register)(self._before_optimizer_state)
                self._hooks.append(hook)

    def _before_optimizer_state(self, *_: object) -> None:
        self.settle_for_reader()

    def _require_sound(self) -> None:
        if self._failure:
            raise ProcessError(
                f"the replicas have come apart: {self._failure}. "
                "Hint: load the newest checkpoint in all processes and call sffx.replicate again"
            )

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Hold a context in which an error is a failure of this process."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """Note a failure, and tell the other processes."""
        if self._failure:
            return
        self._failure = f"{type(error).__name__}: {error}"
        self.agreement.fail(error)
        unsent = set(self._unsent)
        # If nothing of this step was sent, all of it is dropped, and the weights are those of the
        # step before. Otherwise a part of it is applied.
        was_sent = any(sending not in unsent for sending in self._of_this_step())
        self._is_incomplete = self._is_incomplete or was_sent
        self._pending = [sending for sending in self._pending if sending not in unsent]
        self._unsent.clear()

    def _of_this_step(self) -> list[Sending]:
        return [sending for sending in self._pending if sending.step == self.agreement.steps]

    def __reduce__(self) -> Any:
        # Copies and pickles of a replicated model are ordinary models.
        return none, ()


@dataclass(frozen=True)
class _Collected:
    """Gradients of a `local_loss` on their way."""

    replication: Replication
    sending: Sending

    def wait(self) -> Gradients:
        """Return them when they are there."""
        with self.replication.failing():
            return self.sending.wait(self.replication.wait)


def _group_for_gradients(
    group: dist.ProcessGroup | None, agreement: Agreement, timeout: timedelta
) -> dist.ProcessGroup:
    """Return a group for gradients alone, with the backend of the user's group."""
    backend = dist.get_backend(group)
    if backend == "gloo":
        return agreement.group
    return new_group(dist.get_process_group_ranks(group), timeout, backend)


def _why_not_averageable(net: fx.GraphModule) -> str | None:
    """Return why the tensors of a net cannot be averaged, None if they can."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            return (
                f"{name} is on the meta device and has no values. "
                "Hint: net.to_empty(device='cpu') and net.load_state_dict first"
            )
        is_plain = tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)
        if not is_plain:
            return (
                f"{name} is a {type(tensor).__name__} with layout {tensor.layout}, which cannot "
                "be averaged. Hint: plain, dense parameters and buffers can"
            )
    for name, module in net.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            return (
                f"{name} has sparse gradients, which are not averaged over processes. "
                "Hint: make the embedding with sparse=False"
            )
    return None
