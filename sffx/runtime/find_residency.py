"""Choose the residency of a cut model: where its parameters are.

It stands apart from `sffx.runtime.residency`, which all residencies import.
"""

from __future__ import annotations

from torch import fx, nn

from sffx.fsdp import shards_in
from sffx.net import CutModel, plan_of
from sffx.runtime.offload import offloading_of
from sffx.runtime.replicate import replication_of
from sffx.runtime.residency import Residency
from sffx.runtime.shard import Sharding, require_whole


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
        return Sharding(net)
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
