"""Which modules are sharded by FSDP2, torch's `fully_shard`."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from sffx.tensors import modules_in

_FSDP = "torch.distributed.fsdp"


def shards_in(module: nn.Module) -> list[Any]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called on."""
    fsdp = sys.modules.get(_FSDP)
    if fsdp is None:
        return []
    return [each for each in modules_in(module) if isinstance(each, fsdp.FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Return whether `torch.distributed.fsdp.fully_shard` was called on a module."""
    # Importing FSDP takes a second. As long as nobody has imported it, nothing is sharded.
    fsdp = sys.modules.get(_FSDP)
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
