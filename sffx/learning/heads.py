"""The heads of a cut model. A head computes the goodness of a block.

A head is made by name ("sff", "mlp(256)") or by a callable of the user. The contract of `goodness=`
is that of a callable `(block, num_classes) -> nn.Module`. It returns a new module, the head of the
block. It is called for each feature block. The policy "memory" also calls it for blocks that it
only considers. `block` is a `sffx.blocks.Block`. Its `shape`, `channels`, `channel_axis` and `mask`
describe the block's output.

The head is moved to the device and the dtype of the model. Then

- it is called as `head(y)`; where `block.mask` is not empty, as `head(y, mask)`;
- y is the output of the block, (B, C, ...) or (B, T, C), with its channels at axis
  `block.channel_axis`;
- mask is (B, T), nonzero at real tokens, zero at padding;
- it returns the goodness, (B, J), floats: the larger, the more likely the class. The loss uses
  them as logits;
- its parameters learn together with those of the block, from the loss of the block;
- to be exported, it must consist of operations that torch exports.

The contract of `norm=` is in `sffx.learning.norms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from sffx.blocks import Block, BlockPlan, GoodnessMaker, Options, option_name
from sffx.errors import InputError
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.convolution import SFFGoodness
from sffx.learning.cosine import CosineGoodness

HIDDEN = 128  # units of "mlp"
REGIONS = 2  # along each axis of space, of "cosine" and "mlp"


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


def _spatial(block: Block) -> int:
    """Return the number of axes of a block's output besides batch and channels."""
    return len(block.shape) - 1


# Each is called with a block, the number of classes, and the numbers that its name has in brackets.
GOODNESSES: dict[str, Callable[..., nn.Module]] = {
    "sff": _convolution,
    "cwc": _channelwise,
    "cosine": _cosine,
    "mlp": _hidden_layer,
}

# The numbers that a name may have in brackets, as "mlp(128, 2)" has, and their defaults.
NUMBERS: dict[str, tuple[int, ...]] = {
    "sff": (),
    "cwc": (),
    "cosine": (REGIONS,),
    "mlp": (HIDDEN, REGIONS),
}

EXAMPLES = ("sff", "cwc", "cosine", "cosine(4)", "mlp", "mlp(256)", "mlp(256, 4)")

# A word, and in brackets positive numbers with commas between them: "mlp(256, 4)".
_NAME = re.compile(r"(\w+)(?:\(([1-9]\d*(?:, *[1-9]\d*)*)\))?")


def parse_goodness(goodness: str) -> tuple[str, tuple[int, ...]]:
    """Return the key in `GOODNESSES` that a name such as "mlp(256)" has, and its numbers.

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
        f"there is no goodness {goodness!r}. Hint: choose one of {names}, "
        "or pass a callable (block, num_classes) -> nn.Module"
    )


def goodness_maker(options: Options) -> GoodnessMaker:
    """Return the callable that makes the head of a block.

    Raises:
        InputError: there is no such goodness, or it has no use for an option.
    """
    goodness = options.goodness
    if isinstance(goodness, nn.Module):
        raise InputError(
            f"goodness is a module, {type(goodness).__name__}, but each block has a head of its "
            "own. Hint: pass a callable (block, num_classes) -> nn.Module"
        )
    if goodness == "sff":
        return partial(_convolution, kernel_size=options.kernel_size)
    maker = goodness if callable(goodness) else _named(goodness)
    if options.kernel_size != 1:
        raise InputError(
            f"kernel_size is {options.kernel_size!r}, but heads of {option_name(goodness)!r} have "
            "no convolution. Hint: leave it out, or goodness='sff'"
        )
    return maker


def _named(goodness: str) -> GoodnessMaker:
    name, numbers = parse_goodness(goodness)
    maker = GOODNESSES[name]

    def make(block: Block, num_classes: int) -> nn.Module:
        return maker(block, num_classes, *numbers)

    return make


def make_head(options: Options, block: Block, num_classes: int) -> nn.Module:
    """Return the head of one block.

    Raises:
        InputError: there is no such goodness, it cannot be computed for this block, or a callable
            returned no module; names the block.
    """
    maker = goodness_maker(options)
    place = f"{block.target} ({block.name}, output {block.shape})"
    try:
        head = maker(block, num_classes)
    except InputError as cause:
        raise InputError(f"{place}: {cause}") from cause
    if not isinstance(head, nn.Module):
        raise InputError(
            f"{place}: goodness {option_name(options.goodness)} returned a {type(head).__name__}, "
            "not a torch.nn.Module. Hint: return the head, which is called as head(y)"
        )
    return head


def make_heads(plan: BlockPlan, root: nn.Module) -> list[nn.Module]:
    """Return the head of each block, on the device and in the dtype of the model's parameters.

    Raises:
        InputError: as `make_head`.
    """
    # Integer parameters do not have the dtype of a model.
    like = next(p for p in root.parameters() if p.is_floating_point())
    heads = []
    for block in plan:
        head = make_head(plan.options, block, plan.num_classes)
        heads.append(head.to(like.device, like.dtype))
    return heads
