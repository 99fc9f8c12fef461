"""A hook around the forward of a block's module, which copies of the module do not have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class KeepsNothing:
    """A forward hook that does not keep what the module returned."""


@dataclass(frozen=True)
class Gate(KeepsNothing):
    """A hook around the forward of a block's module.

    It does nothing in a copied or unpickled module: copies are neither offloaded nor replicated.

    Attributes:
        call: what to call with the block.
        block: its index.
    """

    call: Callable[[int], None]
    block: int

    def __call__(self, *_: object) -> None:
        # A compiled block compiles its hooks as well, and moving tensors is nothing to compile.
        # Without a compiled block nobody has imported dynamo, which takes a second.
        call = torch.compiler.disable(self.call) if "torch._dynamo" in sys.modules else self.call
        call(self.block)

    def __reduce__(self) -> Any:
        return _open_gate, ()


def remove_open_gates(copy: nn.Module) -> None:
    """Remove what a copy of a model has in the place of gates."""
    for module in copy.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _pass:
                del module._forward_pre_hooks[key]


def none() -> None:
    """Return what a copied model has in the place of its residency: None."""


def _open_gate() -> Callable[..., None]:
    """Return what a copied module has in the place of a gate."""
    return _pass


def _pass(*_: object) -> None:
    """Do nothing."""
