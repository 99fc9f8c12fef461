"""Choose the residency of a cut model: where its parameters are.

It stands apart from `sffx.runtime.residency`, which all residencies import.
"""

from __future__ import annotations

from torch import fx, nn

from sffx.errors import InputError
from sffx.fsdp import shards_in
from sffx.net import CutModel, cut_model, plan_of
from sffx.runtime.offload import offloading_of
from sffx.runtime.replicate import replication_of
from sffx.runtime.residency import Residency
from sffx.runtime.shard import require_whole, sharding_of
from sffx.tensors import WITHOUT_VALUES, name_on_meta


def residency_of(net: fx.GraphModule) -> Residency:
    """Return the residency of a cut model as it is now.

    Raises:
        InputError: `net` is no cut model.
    """
    plan_of(net)
    offloading = offloading_of(net)
    if offloading is not None:
        return offloading
    replication = replication_of(net)
    if replication is not None:
        return replication
    if shards_in(net):
        return sharding_of(net)
    return Residency(net)


def make_whole(net: nn.Module) -> None:
    """Have a model's present weights in the model itself, to copy or to save them.

    Raises:
        InputError: the model is sharded.
        ProcessError: the model is replicated, and another process failed.
    """
    require_whole(net)
    if isinstance(net, CutModel):
        net.settle()


def require_values(net: nn.Module) -> None:
    """Raise an InputError if a tensor of a model is on the meta device, to save or to copy it."""
    name = name_on_meta(net)
    if name:
        raise InputError(
            f"{name} is on the meta device, where tensors have no values. {WITHOUT_VALUES}"
        )


def finish(net: nn.Module) -> None:
    """Apply all pending updates of a replicated net, and agree with the other processes.

    Every process must call it, at the end of an epoch or of the training. It need not be called
    before `evaluate` or `state_dict`, which apply pending updates themselves.

    Args:
        net: what `replicate` or `shard` was called with.

    Raises:
        InputError: `net` is neither replicated nor sharded by sffx.
        ProcessError: another process has made more or fewer steps, or has failed.
    """
    residency = residency_of(cut_model(net))
    if not residency.agrees:
        raise InputError(
            "net is not trained by several processes together. Hint: sffx.replicate(net) or "
            "sffx.shard(net) first"
        )
    residency.agree("finish")
