"""The heads that have a name, such as "sff" or "mlp(256)", for each kind of task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import nn

from sffx.blocks import Block
from sffx.errors import InputError, shown
from sffx.kernels.entropy import MANY_CLASSES
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.convolution import SFFGoodness, check_kernel_size
from sffx.learning.cosine import CosineGoodness
from sffx.learning.numbers import NumberReadout
from sffx.learning.pooling import num_features
from sffx.learning.positions import AtEachPosition, PositionGoodness
from sffx.learning.shared_output import SharedOutput
from sffx.learning.threshold import Threshold

HIDDEN = 128  # units of "mlp"
# Of "auto", where they take at most this share of a block's multiply-adds. Else those of "mlp".
LARGE_HIDDEN = 256
LARGE_REGIONS = 4
LARGE_SHARE = 0.1
REGIONS = 2  # along each axis of space, of "cosine" and "mlp"

# Makes a head from a block, the number of outputs, and the numbers that its name has in brackets;
# "sff" takes `kernel_size` as well.
Maker: TypeAlias = Callable[..., nn.Module]


def _convolution(block: Block, num_classes: int, kernel_size: int = 1) -> nn.Module:
    return SFFGoodness(
        block.channels, num_classes, block.channel_axis, _spatial(block), kernel_size
    )


def _channelwise(block: Block, num_classes: int) -> nn.Module:
    return CwCGoodness(block.channels, num_classes, block.channel_axis)


def _cosine(block: Block, num_classes: int, regions: int) -> nn.Module:
    return CosineGoodness(block.channels, num_classes, block.channel_axis, _spatial(block), regions)


def _hidden_layer(block: Block, num_classes: int, hidden: int, regions: int) -> nn.Module:
    return CosineGoodness(
        block.channels, num_classes, block.channel_axis, _spatial(block), regions, hidden=hidden
    )


def _sized(maker: Maker) -> Maker:
    """Return a maker that gives a head with a hidden layer the size that fits the block.

    Args:
        maker: takes the block, the number of outputs, the hidden units and the regions.
    """

    def make(block: Block, num_outputs: int) -> nn.Module:
        # Small maps have no more regions than places.
        regions = min([LARGE_REGIONS, *_sizes(block)])
        features = num_features(block.channels, _spatial(block), regions)
        if LARGE_HIDDEN * (features + num_outputs) > LARGE_SHARE * block.macs:
            return maker(block, num_outputs, HIDDEN, REGIONS)
        return maker(block, num_outputs, LARGE_HIDDEN, regions)

    return make


def _sized_at_positions(maker: Maker) -> Maker:
    """Return the same for heads that score each position, which have no regions."""

    def make(block: Block, num_outputs: int) -> nn.Module:
        positions = math.prod(_sizes(block))
        macs = positions * LARGE_HIDDEN * (block.channels + num_outputs)
        hidden = HIDDEN if macs > LARGE_SHARE * block.macs else LARGE_HIDDEN
        return maker(block, num_outputs, hidden, REGIONS)

    return make


def _sizes(block: Block) -> list[int]:
    """Return the sizes of a block's output besides batch and channels."""
    sizes = list(block.shape)
    del sizes[block.channel_axis - 1]
    return sizes


def _spatial(block: Block) -> int:
    """Return the number of axes of a block's output besides batch and channels."""
    return len(block.shape) - 1


def _with_threshold(maker: Maker, start: float) -> Maker:
    """Return a maker of heads whose scores are goodness minus a threshold for each label."""

    def make(block: Block, num_labels: int, *numbers: int, **options: int) -> nn.Module:
        return Threshold(maker(block, num_labels, *numbers, **options), num_labels, start)

    return make


def _readout(block: Block, num_outputs: int, kernel_size: int = 1) -> nn.Module:
    _require_no_kernel(kernel_size)
    return NumberReadout(block.channels, num_outputs, block.channel_axis, _spatial(block))


def _require_no_kernel(kernel_size: int) -> None:
    if kernel_size != 1:
        raise InputError(
            f"kernel_size is {kernel_size!r}, but the readout of numbers has no convolution. "
            "Hint: leave it out"
        )


def _readout_of_hidden(block: Block, num_outputs: int, hidden: int, regions: int) -> nn.Module:
    return NumberReadout(
        block.channels, num_outputs, block.channel_axis, _spatial(block), regions, hidden
    )


def _readout_at_each_pixel(block: Block, num_outputs: int, kernel_size: int = 1) -> nn.Module:
    _require_no_kernel(kernel_size)
    return _at_each_pixel(_flat_readout)(block, num_outputs)


def _readout_at_each_token(block: Block, num_outputs: int, kernel_size: int = 1) -> nn.Module:
    _require_no_kernel(kernel_size)
    return _at_each_token(_flat_readout)(block, num_outputs)


def _of_pixels(block: Block, num_classes: int, kernel_size: int = 1) -> nn.Module:
    _require_map(block)
    return PositionGoodness(
        block.channels,
        num_classes,
        block.channel_axis,
        _spatial(block),
        _checked(kernel_size, block),
        classes_last=False,
    )


def _of_tokens(block: Block, num_classes: int, kernel_size: int = 1) -> nn.Module:
    _require_tokens(block)
    return PositionGoodness(
        block.channels,
        num_classes,
        block.channel_axis,
        1,
        _checked(kernel_size, block),
        classes_last=True,
    )


def _checked(kernel_size: int, block: Block) -> int:
    check_kernel_size(kernel_size, _spatial(block))
    return kernel_size


def _at_each_pixel(make: Callable[..., nn.Module]) -> Maker:
    """Return a maker that puts a head of flat values at each pixel."""
    return _at_each_position(make, _require_map, classes_last=False)


def _at_each_token(make: Callable[..., nn.Module]) -> Maker:
    """Return a maker that puts a head of flat values at each token."""
    return _at_each_position(make, _require_tokens, classes_last=True)


def _at_each_position(
    make: Callable[..., nn.Module], require: Callable[[Block], None], *, classes_last: bool
) -> Maker:
    def maker(block: Block, num_classes: int, *numbers: int) -> nn.Module:
        require(block)
        head = make(block.channels, num_classes, *numbers)
        hidden = _hidden_in_parts(head, num_classes)
        return AtEachPosition(head, block.channel_axis, classes_last=classes_last, hidden=hidden)

    return maker


def _hidden_in_parts(head: nn.Module, num_classes: int) -> int:
    """Return the hidden units of a head whose positions are to go through it part by part, or 0.

    With many classes the scores are larger than the hidden layer, and slow to compute twice.
    """
    hidden = getattr(head, "hidden", None)
    return hidden.out_features if hidden is not None and num_classes < MANY_CLASSES else 0


def _flat_channelwise(channels: int, num_classes: int) -> nn.Module:
    return CwCGoodness(channels, num_classes)


def _flat_cosine(channels: int, num_classes: int, regions: int) -> nn.Module:
    _require_no_regions(regions)
    return CosineGoodness(channels, num_classes, spatial=0)


def _flat_hidden_layer(channels: int, num_classes: int, hidden: int, regions: int) -> nn.Module:
    _require_no_regions(regions)
    return CosineGoodness(channels, num_classes, spatial=0, hidden=hidden)


def _flat_readout(channels: int, num_outputs: int) -> nn.Module:
    return NumberReadout(channels, num_outputs, spatial=0)


def _flat_readout_of_hidden(
    channels: int, num_outputs: int, hidden: int, regions: int
) -> nn.Module:
    _require_no_regions(regions)
    return NumberReadout(channels, num_outputs, spatial=0, hidden=hidden)


def _shared_output(block: Block, num_outputs: int) -> nn.Module:
    _require_tokens(block)
    return SharedOutput(block.channels, block.channel_axis)


def _require_no_regions(regions: int) -> None:
    if regions != REGIONS:
        raise InputError(
            f"{regions} regions are of a whole sample, and here each position has a goodness. "
            "Hint: leave the number out, as in 'mlp(256)'"
        )


def _require_map(block: Block) -> None:
    if len(block.shape) < 2:
        raise InputError(
            "its output has no axes of space, which the goodness of pixels needs. "
            "Hint: cut elsewhere, policy=[...] takes the names of nodes, or pass a goodness of "
            "your own"
        )


def _require_tokens(block: Block) -> None:
    if len(block.shape) != 2:
        raise InputError(
            "its output is not of tokens, (B, T, C), which the goodness of tokens needs. "
            "Hint: cut elsewhere, policy=[...] takes the names of nodes, or pass a goodness of "
            "your own"
        )


_hidden_at_each_pixel = _at_each_pixel(_flat_hidden_layer)
_readout_of_hidden_at_each_pixel = _at_each_pixel(_flat_readout_of_hidden)
_hidden_at_each_token = _at_each_token(_flat_hidden_layer)

# The heads of classes of a sample, by name.
GOODNESSES: dict[str, Maker] = {
    "sff": _convolution,
    "cwc": _channelwise,
    "cosine": _cosine,
    "mlp": _hidden_layer,
    "auto": _sized(_hidden_layer),
}

# The heads of each form, by name. A task names its form (`Task.form`).
FORMS: dict[str, Mapping[str, Maker]] = {
    "sample": GOODNESSES,
    # A mean of squares begins near 1 where features are normed. A cosine has a sign.
    "labels": {
        "sff": _with_threshold(_convolution, 1.0),
        "cwc": _with_threshold(_channelwise, 1.0),
        "cosine": _with_threshold(_cosine, 0.0),
        "mlp": _with_threshold(_hidden_layer, 0.0),
        "auto": _with_threshold(_sized(_hidden_layer), 0.0),
    },
    "number": {
        "sff": _readout,
        "mlp": _readout_of_hidden,
        "auto": _sized(_readout_of_hidden),
    },
    "field": {
        "sff": _readout_at_each_pixel,
        "mlp": _readout_of_hidden_at_each_pixel,
        "auto": _sized_at_positions(_readout_of_hidden_at_each_pixel),
    },
    "pixel": {
        "sff": _of_pixels,
        "cwc": _at_each_pixel(_flat_channelwise),
        "cosine": _at_each_pixel(_flat_cosine),
        "mlp": _hidden_at_each_pixel,
        "auto": _sized_at_positions(_hidden_at_each_pixel),
    },
    "mask": {
        "sff": _with_threshold(_of_pixels, 1.0),
        "cwc": _with_threshold(_at_each_pixel(_flat_channelwise), 1.0),
        "cosine": _with_threshold(_at_each_pixel(_flat_cosine), 0.0),
        "mlp": _with_threshold(_hidden_at_each_pixel, 0.0),
        "auto": _with_threshold(_sized_at_positions(_hidden_at_each_pixel), 0.0),
    },
    "token numbers": {
        "sff": _readout_at_each_token,
        "mlp": _at_each_token(_flat_readout_of_hidden),
        "auto": _sized_at_positions(_at_each_token(_flat_readout_of_hidden)),
    },
    "token": {
        "sff": _of_tokens,
        "cwc": _at_each_token(_flat_channelwise),
        "cosine": _at_each_token(_flat_cosine),
        "mlp": _hidden_at_each_token,
        "auto": _sized_at_positions(_hidden_at_each_token),
        "shared": _shared_output,
    },
}

# The numbers that a name may have in brackets, as "mlp(128, 2)" has, and their defaults.
NUMBERS: dict[str, tuple[int, ...]] = {
    "sff": (),
    "cwc": (),
    "cosine": (REGIONS,),
    "mlp": (HIDDEN, REGIONS),
    "auto": (),
    "shared": (),
}

EXAMPLES = (
    "sff",
    "cwc",
    "cosine",
    "cosine(4)",
    "mlp",
    "mlp(256)",
    "mlp(256, 4)",
    "auto",
    "shared",
)

# A word, and in brackets positive numbers with commas between them: "mlp(256, 4)".
_NAME = re.compile(r"(\w+)(?:\(([1-9]\d*(?:, *[1-9]\d*)*)\))?")


def parse_goodness(goodness: str) -> tuple[str, tuple[int, ...]]:
    """Return the key in `FORMS` that a name such as "mlp(256)" has, and its numbers.

    Numbers that are left out have their default: "mlp(256)" gives ("mlp", (256, 2)).

    Raises:
        InputError: there is no such goodness.
    """
    match = _NAME.fullmatch(str(goodness))
    if match is None or match[1] not in NUMBERS:
        raise _unknown(goodness)
    name, brackets = match.groups()
    defaults = NUMBERS[name]
    given = [int(number) for number in brackets.split(",")] if brackets else []
    if len(given) > len(defaults):
        raise _unknown(goodness)
    left_out = defaults[len(given) :]
    return name, (*given, *left_out)


def _unknown(goodness: object) -> InputError:
    names = ", ".join(map(repr, EXAMPLES))
    return InputError(
        f"there is no goodness {shown(goodness)}. Hint: choose one of {names}, "
        "or pass a callable (block, num_classes) -> nn.Module"
    )
