"""Cut models whose blocks and heads `torch.distributed.fsdp.fully_shard` has spread over processes (FSDP2).

Each block and each head is a root of its own to FSDP: its parameters are gathered before its forward and let go of after its backward
pass. In a block-local step the one follows the other at once, so one block is whole at a time. FSDP gives gradients to the shards, which
are the parameters of the model, in a backward pass and not to `torch.autograd.grad`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sffx.errors import InputError

WAY = "for part in net.children(): fully_shard(part)"


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module or on one in it."""
    return bool(_shards(module))


def require_sharded_by_parts(module: nn.Module) -> None:
    """Raise an InputError if `fully_shard` was called on what holds all blocks: FSDP then waits for a backward pass of the whole."""
    if _is_shard(module):
        name = "the LocalLoss" if hasattr(module, "net") else "net"
        raise InputError(f"fully_shard was called on {name} itself, whose blocks then stay whole. Hint: {WAY}")


def require_whole(net: nn.Module) -> None:
    """Raise an InputError if a model is sharded, of which no copy can be made."""
    if is_sharded(net):
        raise InputError(
            "net is sharded (fully_shard), and shards cannot be copied. Hint: torch.distributed.checkpoint.state_dict.get_model_state_dict"
            "(net, options=StateDictOptions(full_state_dict=True)), loaded into a model that is cut in the same way"
        )


def reshard(module: nn.Module) -> None:
    """Let go of parameters that were gathered, which FSDP keeps after a forward pass that no backward pass has followed yet."""
    for shard in _shards(module):
        shard.reshard()


def sharded_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of shards, averaged over the processes; what the shards had is left as it was, their hooks are not called."""
    held = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        with _accumulation_hooks_kept_back(parameters):
            loss.backward()
        return {p: p.grad for p in parameters if p.grad is not None}
    finally:
        for p, gradient in zip(parameters, held, strict=True):
            p.grad = gradient


@contextmanager
def _accumulation_hooks_kept_back(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    hooks = {p: p._post_accumulate_grad_hooks for p in parameters if p._post_accumulate_grad_hooks}
    for p in hooks:
        p._post_accumulate_grad_hooks = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for p, kept in hooks.items():
            p._post_accumulate_grad_hooks = kept


def _shards(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if _is_shard(each)]


def _is_shard(module: nn.Module) -> bool:
    # What was not imported has sharded nothing, and takes a second to import.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
