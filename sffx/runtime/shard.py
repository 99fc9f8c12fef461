"""Spread the parameters of a cut model over processes, so that a process gathers those of one block at a time (FSDP2).

Each block and each head is a root of its own to FSDP: its parameters are gathered before its forward and let go of after its backward
pass. In a block-local step the one follows the other at once. FSDP gives gradients to the shards, which are the parameters of the model, in
a backward pass and not to `torch.autograd.grad`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from sffx.compiler.trace import shards_in
from sffx.errors import InputError
from sffx.net import plan_of
from sffx.runtime.hooks import kept_back


def shard(net: fx.GraphModule, **options: Any) -> None:
    """Shard the parameters of a cut model over the processes, block by block and head by head, by torch's `fully_shard`.

    To be called by every process, before the optimizer is made. `local_loss`, `local_step` and `evaluate` then gather the parameters of one
    block and its head at a time. Gradients are averaged over the processes at every call, also where gradient sync is off. Weights for
    `extract` and the exports come by `get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))` of
    `torch.distributed.checkpoint.state_dict`, loaded into a model that is cut in the same way.

    Args:
        net: what `transform` returned, the same in every process.
        options: of `fully_shard`: `mesh`, `mp_policy`, `offload_policy`, ...

    Raises:
        InputError: `net` is no cut model, or is sharded already.
    """
    plan = plan_of(net)
    if shards_in(net):
        raise InputError("net is sharded already")
    from torch.distributed import fsdp

    parts: list[Any] = [net.get_submodule(target) for part in plan.parts for target in part]
    for part in parts:
        fsdp.fully_shard(part, **options)
    if hasattr(
        fsdp, "share_comm_ctx"
    ):  # or each part has streams of its own, and memory that no other part can use
        fsdp.share_comm_ctx(parts)
    origin: Any = net.origin
    _forget_parameters(origin.model)


def require_whole(net: nn.Module) -> None:
    """Raise an InputError if a model is sharded, of which no copy can be made."""
    if shards_in(net):
        raise InputError(
            "net is sharded, and shards cannot be copied. Hint: torch.distributed.checkpoint.state_dict.get_model_state_dict"
            "(net, options=StateDictOptions(full_state_dict=True)), loaded into a model that is cut in the same way"
        )


def ready(net: nn.Module) -> bool:
    """Make a cut model ready for a block-local step, and return whether it is sharded.

    Raises:
        InputError: it is no cut model, is sharded as a whole, where FSDP waits for a backward pass of the whole, or in parts only, where
            gradients of the others would differ between the processes.
    """
    plan_of(net)
    shards = shards_in(net)
    if not shards:
        return False
    if net in shards:
        raise InputError(
            "fully_shard was called on net itself, whose blocks then stay whole. Hint: sffx.shard(net) shards its parts"
        )
    for module in shards:
        module.reshard()  # or the parameters are those of the last forward pass
    left = [name for name, p in net.named_parameters() if p.requires_grad and _is_whole(p)]
    if left:
        raise InputError(
            f"{left[0]} is not sharded, while others of net are; its gradient would be averaged by nobody. Hint: sffx.shard(net) shards all"
        )
    for module in shards:
        module.set_requires_gradient_sync(True, recurse=False)
    return True


def reshard(module: nn.Module) -> None:
    """Let go of parameters that were gathered, which FSDP keeps after a forward pass that no backward pass has followed yet."""
    for each in shards_in(module):
        each.reshard()


def sharded_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of shards, averaged over the processes; what the shards had is left as it was, their hooks are not called."""
    held = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with kept_back(p._post_accumulate_grad_hooks for p in parameters):
            loss.backward()
        return {p: p.grad for p in parameters if p.grad is not None}
    finally:
        for p, gradient in zip(parameters, held, strict=True):
            p.grad = gradient


def _forget_parameters(model: nn.Module) -> None:
    """Put meta tensors in the place of whole parameters: those that a block reads itself, and not by a layer, are held here as well."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and _is_whole(p):
                module._parameters[name] = nn.Parameter(
                    p.detach().to("meta"), requires_grad=p.requires_grad
                )


def _is_whole(p: nn.Parameter) -> bool:
    from torch.distributed.tensor import (
        DTensor,
    )  # which whatever has sharded parameters has imported

    return not isinstance(p, DTensor)
