"""Spread the parameters of a cut model over processes (FSDP2), gathered one block at a time.

Each block and each head is a root of its own to FSDP. FSDP gathers a root's parameters before its
forward and lets go of them after its backward pass. In a block-local step the backward pass follows
at once. FSDP hands gradients to the shards, which are the model's parameters, in a backward pass.
It does not hand them to `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from sffx.errors import InputError
from sffx.fsdp import shards_in
from sffx.kernels.precision import full_precision
from sffx.net import plan_of
from sffx.runtime.gradients import Gradients, hooks_held_back
from sffx.runtime.optimizers import require_optimizers_of
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, stages_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(net: fx.GraphModule, **options: Any) -> None:
    """Shard the parameters of a cut model over the processes, by torch's `fully_shard`.

    Every process must call it, before the optimizer is made. `local_loss`, `local_step` and
    `evaluate` then gather the parameters of one block and its head at a time. Gradients are
    averaged over the processes at every call, also where gradient sync is off. So are the running
    statistics of batch norms. Other buffers become those of the first process, as in
    `DistributedDataParallel`. So the model is the same everywhere, and a checkpoint has all of it.

    For `extract` and the exports, get the whole weights by
    `get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))` of
    `torch.distributed.checkpoint.state_dict`. Load them into a model that is cut in the same way.

    Args:
        net: what `transform` returned, the same in every process.
        options: of `fully_shard`: `mesh`, `mp_policy`, `offload_policy`, ...

    Raises:
        InputError: `net` is no cut model, or is sharded already, or there are no processes.
    """
    plan_of(net)
    if shards_in(net):
        raise InputError("net is sharded already")
    if "mesh" not in options and not dist.is_initialized():
        raise InputError(
            "there is no process group to shard over. Hint: start the processes by torchrun and "
            "call torch.distributed.init_process_group(), or pass mesh"
        )
    # Here, because its import takes a second.
    from torch.distributed import fsdp

    parts: list[Any] = [module for stage in stages_of(net) for module in stage.modules]
    for part in parts:
        fsdp.fully_shard(part, **options)
    # Without a common context, each part has streams and memory that no other part can use.
    if hasattr(fsdp, "share_comm_ctx"):
        fsdp.share_comm_ctx(parts)
    origin: Any = net.origin
    _forget_parameters(origin.model)


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
    """The parameters are spread over processes."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self._shards = shards_in(net)
        self._groups: list[dist.ProcessGroup] = []

    def prepare(self) -> None:
        """Make the shards ready for a block-local step.

        Raises:
            InputError: the model is sharded as a whole, so that FSDP waits for a backward pass of
                the whole; or only parts of it are, so that gradients of the other parts would
                differ between the processes.
        """
        if self.net in self._shards:
            raise InputError(
                "fully_shard was called on net itself, whose blocks then stay whole. "
                "Hint: sffx.shard(net) shards its parts"
            )
        # Until then, the parameters are those that the last forward pass gathered.
        for module in self._shards:
            module.reshard()
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad and _is_whole(parameter):
                raise InputError(
                    f"{name} is not sharded, while others of net are; its gradient would be "
                    "averaged by nobody. Hint: sffx.shard(net) shards all"
                )
        for module in self._shards:
            module.set_requires_gradient_sync(True, recurse=False)
        self._groups = _groups_of(self.net)

    @contextmanager
    def training_step(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """Hold a context for one `local_step`. FSDP averages the gradients of the processes."""
        require_optimizers_of(self.net, optimizers)
        yield

    def gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> Gradients:
        """Return the gradients of shards, averaged over the processes.

        What the shards hold as `.grad` is left as it was. Their hooks are not called.
        """
        held = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        hooks = (parameter._post_accumulate_grad_hooks for parameter in parameters)
        try:
            with hooks_held_back(hooks), full_precision(loss):
                loss.backward()
            return {p: p.grad for p in parameters if p.grad is not None}
        finally:
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient

    def release(self, stage: Stage, *, changed: bool) -> None:
        """Let go of a stage's gathered parameters, and make its buffers the same everywhere.

        FSDP does the former after a backward pass. A frozen part, or one that runs without
        gradients, has none.
        """
        for module in stage.modules:
            for each in shards_in(module):
                each.reshard()
            for group in self._groups:
                _equalise_buffers(module, group)


def _groups_of(net: nn.Module) -> list[dist.ProcessGroup]:
    """Return the groups of processes that a model is sharded over, one for each axis of its mesh.

    All parameters must be shards at this moment.
    """
    for parameter in net.parameters():
        if not _is_whole(parameter):
            mesh = cast("DTensor", parameter).device_mesh
            return [mesh.get_group(axis) for axis in range(mesh.ndim)]
    return []


@torch.no_grad()
def _equalise_buffers(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Make the buffers that a training step may have changed the same in all processes.

    Running statistics are linear in those of the batches, so their mean over the processes is what
    all batches together would have given.
    """
    first = dist.get_global_rank(group, 0)
    for part in module.modules():
        if not part.training:
            continue
        for buffer in part.buffers(recurse=False):
            if isinstance(part, _BatchNorm) and buffer.is_floating_point():
                dist.all_reduce(buffer, group=group)
                buffer.div_(group.size())
            else:
                dist.broadcast(buffer, first, group=group)


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
