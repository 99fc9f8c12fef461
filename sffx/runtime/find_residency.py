"""Choose the residency of a cut model: where its parameters are.

It stands apart from `sffx.runtime.residency`, which all residencies import.
"""

from __future__ import annotations

from torch import fx

from sffx.fsdp import shards_in
from sffx.net import plan_of
from sffx.runtime.offload import offloading_of
from sffx.runtime.residency import Residency
from sffx.runtime.shard import Sharding


def residency_of(net: fx.GraphModule) -> Residency:
    """Return the residency of a cut model as it is now.

    Raises:
        InputError: `net` is no cut model.
    """
    plan_of(net)
    offloading = offloading_of(net)
    if offloading is not None:
        return offloading
    if shards_in(net):
        return Sharding(net)
    return Residency(net)
