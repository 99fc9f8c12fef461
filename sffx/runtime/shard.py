"""Spread the parameters of a cut model over processes (FSDP2), gathered one block at a time.

A block and its head are one group and a root of its own to FSDP. FSDP gathers a group's parameters
before its forward and lets go of them after its backward pass. In a block-local step the backward
pass follows at once. The next group is gathered while a block runs. FSDP hands gradients to the
shards, which are the model's parameters, in a backward pass. It does not hand them to
`torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sffx.checks import positive_time
from sffx.errors import InputError, ProcessError
from sffx.fsdp import is_sharded, shards_in
from sffx.kernels.precision import full_precision
from sffx.net import plan_of, require_blocks_uncompiled
from sffx.runtime.agreement import (
    Agreement,
    Word,
    checksums_of,
    require_processes,
    require_same,
    structure_of,
)
from sffx.runtime.averaging import Averaging, averaged_buffers, copied_buffers
from sffx.runtime.gate import Gate, none
from sffx.runtime.gradients import Gradients, hooks_held_back
from sffx.runtime.optimizers import require_optimizers_of
from sffx.runtime.residency import Residency
from sffx.runtime.sending import norms_before
from sffx.runtime.stage import Stage, stages_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


_ATTRIBUTE = "sharding"


def shard(net: fx.GraphModule, *, timeout: timedelta | float = 600.0, **options: Any) -> None:
    """Shard the parameters of a cut model over the processes, by torch's `fully_shard`.

    Every process must call it, before the optimizer is made. `local_loss`, `local_step` and
    `evaluate` then gather the parameters of one block and its head at a time, and those of the next
    one meanwhile. Gradients are averaged over the processes at every call, also where gradient sync
    is off. So are the running statistics of batch norms. Other buffers become those of the first
    process, as in `DistributedDataParallel`. So the model is the same everywhere, and a checkpoint
    has all of it.

    For `extract` and the exports, get the whole weights by
    `get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))` of
    `torch.distributed.checkpoint.state_dict`. Load them into a model that is cut in the same way.

    Before each step, and each batch of an evaluation, the processes agree on it. So loaders of
    different length end in an error.

    Args:
        net: what `transform` returned, the same in every process.
        timeout: how long a process waits for the others to agree, in seconds or as a timedelta.
        options: of `fully_shard`: `mesh`, `mp_policy`, `offload_policy`, ...

    Raises:
        InputError: `net` is no cut model, or is sharded or replicated already, or there are no
            processes; or the nets of the processes differ in a shape or in a weight.
    """
    plan_of(net)
    require_blocks_uncompiled(net, "sffx.shard")
    if shards_in(net):
        raise InputError("net is sharded already. Hint: call sffx.shard once")
    if getattr(net, "replication", None) is not None:
        raise InputError(
            "net is replicated, and replicas hold all parameters. "
            "Hint: copy.deepcopy(net) is not replicated"
        )
    require_processes(None)
    wait = positive_time("timeout", timeout)
    agreement = Agreement(_ranks(options.get("mesh")), wait)
    # FSDP takes each process's share of its own weights. Different weights would be mixed.
    require_same({**structure_of(net), **checksums_of(net)}, agreement.group)
    # Here, because its import takes a second.
    from torch.distributed import fsdp

    # A root keeps its parameters from the forward to the backward pass. A group does so if told.
    options.setdefault("reshard_after_forward", False)
    roots: list[Any] = []
    for stage in stages_of(net):
        root = _Root(stage.modules)
        fully_shard: Any = fsdp.fully_shard
        fully_shard(stage.modules, **options)
        roots.append(fully_shard(root, **options))
    # Without a common context, each root has streams and memory that no other root can use.
    if hasattr(fsdp, "share_comm_ctx"):
        fsdp.share_comm_ctx(roots)
    origin: Any = net.origin
    _forget_parameters(origin.model)
    sharding = Sharding(net, agreement)
    sharding.put_gates(roots)
    setattr(net, _ATTRIBUTE, sharding)


class _Root(nn.Module):
    """What FSDP needs above a block and its head, to gather both at once."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules_of_stage = nn.ModuleList(modules)

    def forward(self) -> None:
        """Do nothing. FSDP sets itself up before the first forward of a root."""


def sharding_of(net: fx.GraphModule) -> Sharding:
    """Return how a sharded model is sharded, also by the user's own calls of `fully_shard`."""
    sharding: Sharding | None = getattr(net, _ATTRIBUTE, None)
    if sharding is None:
        sharding = Sharding(net, None)
        setattr(net, _ATTRIBUTE, sharding)
    return sharding


def require_whole(net: nn.Module) -> None:
    """Raise an InputError if a model is sharded, since shards cannot be copied."""
    if shards_in(net):
        raise InputError(
            "net is sharded, and shards cannot be copied. "
            "Hint: torch.distributed.checkpoint.state_dict.get_model_state_dict"
            "(net, options=StateDictOptions(full_state_dict=True)), loaded into a model that is "
            "cut in the same way"
        )


class Sharding(Residency):
    """The parameters are spread over processes.

    Attributes:
        agreement: in which the processes say what they are about to do, None where the user sharded
            the model by calls of `fully_shard`.
    """

    def __init__(self, net: fx.GraphModule, agreement: Agreement | None) -> None:
        super().__init__(net)
        self.agreement = agreement
        self._coming: list[Any] = []
        self._roots: list[nn.Module] = []
        self._gates: list[Any] = []
        self._groups: list[dist.ProcessGroup] = []

    @property
    def agrees(self) -> bool:
        """Whether processes tell each other what they are about to do."""
        return self.agreement is not None

    @property
    def heads_run_always(self) -> bool:
        """Whether a head runs with its block even where nobody asks for its scores.

        FSDP waits for all modules of a group.
        """
        return True

    def prepare(self) -> None:
        """Make the shards ready for a block-local step.

        Raises:
            InputError: the model is sharded as a whole, so that FSDP waits for a backward pass of
                the whole; or only parts of it are, so that gradients of the other parts would
                differ between the processes.
        """
        shards = shards_in(self.net)
        if self.net in shards:
            raise InputError(
                "fully_shard was called on net itself, whose blocks then stay whole. "
                "Hint: sffx.shard(net) shards its parts"
            )
        self._set_up()
        self._drop_coming()
        # Until then, the parameters are those that the last forward pass gathered.
        for module in shards:
            module.reshard()
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad and _is_whole(parameter):
                raise InputError(
                    f"{name} is not sharded, while others of net are; its gradient would be "
                    "averaged by nobody. Hint: sffx.shard(net) shards all"
                )
        for module in shards:
            module.set_requires_gradient_sync(True, recurse=False)
        self._groups = _groups_of(self.net)

    @contextmanager
    def learning(self, stages: Sequence[Stage], action: str) -> Iterator[None]:
        """Hold a context in which stages learn, once the processes agree on it.

        Raises:
            ProcessError: another process does something else, or failed.
        """
        if self.agreement is not None:
            self.agreement.steps += 1
        self.agree(action)
        yield
        # A norm runs when its stage was released.
        norms = list(chain.from_iterable(norms_before(stages)))
        for group in self._groups:
            _equalise_buffers(norms, group)

    def agree(self, action: str) -> None:
        """Wait until all processes do the same thing.

        Raises:
            ProcessError: another process does something else, or failed.
        """
        if self.agreement is None:
            return
        try:
            self.agreement.require(Word(action, self.agreement.steps))
        except ProcessError as error:
            self.agreement.fail(error)
            raise

    def scoring(self) -> None:
        """Wait until all processes compute scores: each gathers from the others."""
        self.agree("scores")
        self._set_up()
        self._drop_coming()

    def put_gates(self, roots: Sequence[nn.Module]) -> None:
        """Let FSDP know its roots before it first runs a block, also in a forward of the whole net.

        Not at once, since the parameters may still be on the meta device.

        Args:
            roots: one for each stage. They run once and do nothing.
        """
        self._roots = list(roots)
        for stage in stages_of(self.net):
            for module in stage.modules:
                gate = Gate(self._set_up, stage.index)
                self._gates.append(module.register_forward_pre_hook(gate, prepend=True))

    def _set_up(self, _: int = 0) -> None:
        for root in self._roots:
            root()
        for gate in self._gates:
            gate.remove()
        self._roots.clear()
        self._gates.clear()

    def enter(self, stage: Stage, following: Stage | None) -> None:
        """Gather a stage that is about to run, and begin to gather the one after it."""
        # What is coming is this stage: the walk names it as `following` before.
        if not self._coming:
            self._gather(stage)
        self._coming = []
        if following is not None:
            self._coming = self._gather(following)

    def _gather(self, stage: Stage) -> list[Any]:
        """Begin to gather a stage, and return its modules that are sharded as a whole.

        A stage that the user sharded in smaller parts is gathered part by part when it runs.
        """
        modules: list[Any] = [module for module in stage.modules if is_sharded(module)]
        for module in modules:
            module.unshard(async_op=True)
        return modules

    def _drop_coming(self) -> None:
        """Let go of what was gathered for a stage that did not run: its weights may change."""
        for module in self._coming:
            # This waits for what `_gather` began. FSDP would take it for the next gathering.
            module.unshard()
            module.reshard()
        self._coming = []

    @contextmanager
    def training_step(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """Hold a context for one `local_step`. FSDP averages the gradients of the processes."""
        require_optimizers_of(self.net, optimizers)
        yield

    def gradients(
        self, start: Tensor, parameters: list[nn.Parameter], gradient: Tensor | None
    ) -> Gradients:
        """Return the gradients of shards, averaged over the processes.

        What the shards hold as `.grad` is left as it was. Their hooks are not called.
        """
        held = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        hooks = (parameter._post_accumulate_grad_hooks for parameter in parameters)
        try:
            with hooks_held_back(hooks), full_precision(start):
                start.backward(gradient)
            return {p: p.grad for p in parameters if p.grad is not None}
        finally:
            for parameter, earlier in zip(parameters, held, strict=True):
                parameter.grad = earlier

    def release(self, stage: Stage, *, changed: bool) -> None:
        """Let go of a stage's gathered parameters, and make its buffers the same everywhere.

        FSDP does the former after a backward pass. A frozen part, or one that runs without
        gradients, has none.
        """
        for module in stage.modules:
            for each in shards_in(module):
                each.reshard()
        for group in self._groups:
            _equalise_buffers(stage.modules, group)

    def __reduce__(self) -> Any:
        return none, ()


def _ranks(mesh: DeviceMesh | None) -> list[int]:
    """Return the ranks of the processes to shard over."""
    if mesh is None:
        return dist.get_process_group_ranks(None)
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def _groups_of(net: nn.Module) -> list[dist.ProcessGroup]:
    """Return the groups of processes that a model is sharded over, one for each axis of its mesh.

    All parameters must be shards at this moment.
    """
    for parameter in net.parameters():
        if not _is_whole(parameter):
            mesh = cast("DTensor", parameter).device_mesh
            return [mesh.get_group(axis) for axis in range(mesh.ndim)]
    return []


def _equalise_buffers(modules: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
    """Make the buffers that a training step may have changed the same in all processes.

    For running statistics this is their mean.
    """
    averaged = averaged_buffers(modules)
    copied = copied_buffers(modules)
    Averaging([], {}, group, averaged, copied).wait()


def _forget_parameters(model: nn.Module) -> None:
    """Put meta tensors in the place of whole parameters of the original model.

    A parameter that a block reads itself, not through a layer, would be held whole here.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_whole(parameter):
                meta = parameter.detach().to("meta")
                module._parameters[name] = nn.Parameter(meta, requires_grad=parameter.requires_grad)


def _is_whole(parameter: nn.Parameter) -> bool:
    # A model with a sharded parameter has imported this already.
    from torch.distributed.tensor import DTensor

    return not isinstance(parameter, DTensor)
