"""What a training has come to, block by block, and the colours in which a drawing shows it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# From the lowest to the highest; all of them are light enough for dark letters.
ACCURACY_COLOURS = ("#fdf1dc", "#8ccfa9")
RATE_COLOURS = ("#f3eff9", "#c3b0e6")

BLOCK = "block_"


@dataclass(frozen=True)
class Progress:
    """Accuracies and learning rates of a training.

    Attributes:
        accuracy: by the readout's name, "block_0", ..., "classifier", "ensemble", between 0 and 1.
        rates: learning rates by the block's name; a block without trainable parameters has none.
    """

    accuracy: Mapping[str, float]
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def of_blocks(self) -> dict[str, float]:
        """The accuracies of the blocks and of the classifier, without those of the whole net."""
        return {
            name: value
            for name, value in self.accuracy.items()
            if name.startswith(BLOCK) or name == "classifier"
        }

    def accuracy_colour(self, name: str) -> str:
        """Return the colour of a block's accuracy, from the lowest of all blocks to the highest."""
        return _between(self.of_blocks[name], self.of_blocks.values(), ACCURACY_COLOURS)

    def rate_colour(self, name: str) -> str:
        """Return the colour of a block's learning rate, from the lowest to the highest by their logarithms; 0 is like the lowest."""
        logs = [math.log(rate) for rate in self.rates.values() if rate > 0]
        own = self.rates[name]
        return _between(math.log(own) if own > 0 else min(logs, default=0.0), logs, RATE_COLOURS)

    def summary(self) -> str:
        """Return the accuracies of the whole net in a phrase: "accuracy: ensemble 93.1 %, classifier 92.0 %"."""
        whole = {name: value for name, value in self.accuracy.items() if not name.startswith(BLOCK)}
        return "accuracy: " + ", ".join(f"{name} {percent(value)}" for name, value in whole.items())


def percent(share: float) -> str:
    """A share as it is written in drawings: `93.1 %`."""
    return f"{100 * share:.1f} %"


def _between(value: float, values: Collection[float], colours: tuple[str, str]) -> str:
    """Mix two colours by where a value lies between the lowest and the highest; where all are equal, the last."""
    low, high = min(values, default=value), max(values, default=value)
    share = (value - low) / (high - low) if high > low else 1.0
    first, last = ([int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours)
    return "#" + "".join(
        f"{round(a + share * (b - a)):02x}" for a, b in zip(first, last, strict=True)
    )
