"""Which modules are sharded by FSDP2, torch's `fully_shard`."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def shards_in(module: nn.Module) -> list[Any]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called on."""
    # Importing FSDP takes a second. As long as nobody has imported it, nothing is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [each for each in module.modules() if isinstance(each, fsdp.FSDPModule)]
