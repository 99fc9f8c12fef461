"""The heads by name."""

from __future__ import annotations

import re

from torch import nn

from sffx.errors import InputError
from sffx.learning.cosine import CosineGoodness
from sffx.learning.goodness import CwCGoodness, SFFGoodness

GOODNESSES = ("sff", "cwc", "cosine", "cosine(4)", "mlp", "mlp(256)", "mlp(256, 4)")
HIDDEN = 128  # units of "mlp"
REGIONS = 2  # along each axis of space, of "cosine" and "mlp"


def cosine_named(goodness: str) -> tuple[int | None, int] | None:
    """Return the number of hidden units, None without a hidden layer, and of regions of a "cosine" or "mlp"; None for other names."""
    number = r"([1-9]\d*)"
    if mlp := re.fullmatch(rf"mlp(?:\({number}(?:, *{number})?\))?", str(goodness)):
        return int(mlp[1] or HIDDEN), int(mlp[2] or REGIONS)
    if cosine := re.fullmatch(rf"cosine(?:\({number}\))?", str(goodness)):
        return None, int(cosine[1] or REGIONS)
    return None


def make_head(
    goodness: str,
    channels: int,
    num_classes: int,
    channel_axis: int,
    spatial: int,
    kernel_size: int = 1,
    rank: int | None = None,
) -> nn.Module:
    """Return the head that computes the named goodness.

    Args:
        goodness: a name in `GOODNESSES`. The number of a cosine is that of the regions along each axis of space, 2 where there is none;
            those of "mlp", a cosine after a hidden layer, the number of its units, 128, and that of the regions.
        channels: as are the next three, as for `SFFGoodness`.
        num_classes: J.
        channel_axis: of the block's batched output.
        spatial: number of its axes besides batch and channels.
        kernel_size: of the auxiliary convolution of "sff".
        rank: of its weight.

    Raises:
        InputError: there is no such goodness, it cannot be computed for these channels and classes, or it has no use for an argument.
    """
    if goodness == "sff":
        return SFFGoodness(channels, num_classes, channel_axis, spatial, kernel_size, rank)
    cosine = cosine_named(goodness)
    if goodness != "cwc" and cosine is None:
        raise InputError(
            f"there is no goodness {goodness!r}. Hint: choose one of {', '.join(map(repr, GOODNESSES))}"
        )
    for name, value, default in (("kernel_size", kernel_size, 1), ("rank", rank, None)):
        if value != default:
            raise InputError(
                f"{name} is {value!r}, but heads of {goodness!r} have no convolution. Hint: leave it out, or goodness='sff'"
            )
    if cosine is None:
        return CwCGoodness(channels, num_classes, channel_axis)
    hidden, regions = cosine
    return CosineGoodness(channels, num_classes, channel_axis, spatial, regions, hidden=hidden)
