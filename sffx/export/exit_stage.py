"""One stage of an early exit, on torch or on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ExitStage:
    """One block with its head, and before it the norm of the block before.

    Attributes:
        name: of the block, "block_0".
        inputs: names of the values that it reads.
        outputs: names of the values that later stages read.
        macs: multiply-adds for one sample, the head included.
        run: takes the inputs, in order; returns the goodness, (B, J), and then the outputs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    run: Callable[..., Sequence[Any]]

    def score(self, values: dict[str, Any]) -> Tensor:
        """Run on the values that it reads, add its outputs to them, and return the goodness."""
        goodness, *outputs = self.run(*(values[name] for name in self.inputs))
        values.update(zip(self.outputs, outputs, strict=True))
        return goodness

    def hand_on(self, values: dict[str, Any]) -> None:
        """Do nothing: the next stage begins with this one's norm."""
