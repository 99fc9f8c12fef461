"""Accuracies and learning rates of a training, block by block, and the colours that show them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from sffx.parts import CLASSIFIER, is_block

# From the lowest to the highest; all of them are light enough for dark letters.
ACCURACY_COLOURS = ("#fdf1dc", "#8ccfa9")
RATE_COLOURS = ("#f3eff9", "#c3b0e6")


@dataclass(frozen=True)
class Progress:
    """Accuracies and learning rates of a training.

    Attributes:
        accuracy: by the readout's name, "block_0", ..., "classifier", "ensemble"; between 0 and 1.
            A classifier that the objective does not train has none.
        rates: learning rates by the block's name; a block without trainable parameters has none.
    """

    accuracy: Mapping[str, float]
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def of_blocks(self) -> dict[str, float]:
        """The accuracies of the blocks and of the classifier, without those of the whole net."""
        own = {}
        for name, value in self.accuracy.items():
            if is_block(name) or name == CLASSIFIER:
                own[name] = value
        return own

    def accuracy_colour(self, name: str) -> str:
        """Return the colour of a block's accuracy, from the lowest of all blocks to the highest.

        A block without an accuracy has none, "", and neither has one whose accuracy is nan.
        """
        accuracies = {}
        for block, value in self.of_blocks.items():
            if math.isfinite(value):
                accuracies[block] = value
        if name not in accuracies:
            return ""
        return _between(accuracies[name], accuracies.values(), ACCURACY_COLOURS)

    def rate_colour(self, name: str) -> str:
        """Return the colour of a block's learning rate, from the lowest to the highest.

        The scale is logarithmic. A rate of 0, or one that is not finite, has the colour of the
        lowest.
        """
        logs = [math.log(rate) for rate in self.rates.values() if _has_log(rate)]
        rate = self.rates[name]
        own = math.log(rate) if _has_log(rate) else min(logs, default=0.0)
        return _between(own, logs, RATE_COLOURS)

    def summary(self) -> str:
        """Return the accuracies of the whole net, as in "accuracy: ensemble 93.1 %".

        It is "" where there are none.
        """
        phrases = []
        for name, value in self.accuracy.items():
            if not is_block(name):
                phrases.append(f"{name} {percent(value)}")
        return f"accuracy: {', '.join(phrases)}" if phrases else ""


def percent(share: float) -> str:
    """Return a share as drawings show it: "93.1 %"."""
    return f"{100 * share:.1f} %"


def _has_log(rate: float) -> bool:
    return 0 < rate < math.inf


def _between(value: float, values: Collection[float], colours: tuple[str, str]) -> str:
    """Return a mix of two colours by where a value lies between the lowest and the highest.

    Where all values are equal it is the second colour.
    """
    low = min(values, default=value)
    high = max(values, default=value)
    share = (value - low) / (high - low) if high > low else 1.0
    lowest, highest = colours
    mixed = "#"
    # The positions of red, green and blue in "#rrggbb".
    for position in (1, 3, 5):
        first = int(lowest[position : position + 2], 16)
        second = int(highest[position : position + 2], 16)
        between = round(first + share * (second - first))
        mixed += f"{between:02x}"
    return mixed
