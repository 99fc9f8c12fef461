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
- where the model folds instances of a sample into the batch, y holds single instances,
  (B * N, ...), and the goodness of a sample is the mean of theirs. The callable gets a block with
  the shape and the channel axis of one instance;
- it returns the goodness, (B, J), floats: the larger, the more likely the class. The loss uses
  them as logits. For another task than classification it returns the scores of that task
  (`sffx.tasks`);
- its parameters learn together with those of the block, from the loss of the block;
- to be exported, it must consist of operations that torch exports.

Where several streams cross the cut after a block, each has a head of its own, and the goodness of
the block is the mean of theirs (`StreamHeads`). The callable is then called for each stream, with
a block that has the value of this stream as its output. If the streams share their layers and the
goodness is "sff", "cosine" or "mlp", they have one head, which compares them (`SideBySide`).

The contract of `norm=` is in `sffx.learning.norms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from torch import nn

from sffx.blocks import Block, BlockPlan, GoodnessMaker, Options, option_name
from sffx.checks import require_callable
from sffx.errors import InputError
from sffx.kernels.entropy import MANY_CLASSES
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.convolution import SFFGoodness, check_kernel_size
from sffx.learning.cosine import CosineGoodness
from sffx.learning.instances import InstanceMean
from sffx.learning.masks import require_mask_argument
from sffx.learning.numbers import NumberReadout
from sffx.learning.positions import AtEachPosition, PositionGoodness
from sffx.learning.shared_output import SharedOutput, connect
from sffx.learning.stream_heads import SideBySide, StreamHeads, share_layers, side_by_side
from sffx.learning.threshold import Threshold
from sffx.tasks import CLASSIFICATION, Task
from sffx.tensors import require_identity

HIDDEN = 128  # units of "mlp"
# Each score is computed from all channels, of any number. "cwc" gives each class channels of its
# own, and "shared" applies the output layer, which takes the channels of one stream.
_MIXING = ("sff", "cosine", "mlp")
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


def _spatial(block: Block) -> int:
    """Return the number of axes of a block's output besides batch and channels."""
    return len(block.shape) - 1


def _with_threshold(maker: Maker, start: float) -> Maker:
    """Return a maker of heads whose scores are goodness minus a threshold for each label."""

    def make(block: Block, num_labels: int, *numbers: int, **options: int) -> nn.Module:
        return Threshold(maker(block, num_labels, *numbers, **options), num_labels, start)

    return make


def _readout(block: Block, num_outputs: int, kernel_size: int = 1) -> nn.Module:
    if kernel_size != 1:
        raise InputError(
            f"kernel_size is {kernel_size!r}, but the readout of numbers has no convolution. "
            "Hint: leave it out"
        )
    return NumberReadout(block.channels, num_outputs, block.channel_axis, _spatial(block))


def _readout_of_hidden(block: Block, num_outputs: int, hidden: int, regions: int) -> nn.Module:
    return NumberReadout(
        block.channels, num_outputs, block.channel_axis, _spatial(block), regions, hidden
    )


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

    def maker(block: Block, num_classes: int, *numbers: int) -> nn.Module:
        _require_map(block)
        head = make(block.channels, num_classes, *numbers)
        hidden = _hidden_in_parts(head, num_classes)
        return AtEachPosition(head, block.channel_axis, classes_last=False, hidden=hidden)

    return maker


def _at_each_token(make: Callable[..., nn.Module]) -> Maker:
    """Return a maker that puts a head of flat values at each token."""

    def maker(block: Block, num_classes: int, *numbers: int) -> nn.Module:
        _require_tokens(block)
        head = make(block.channels, num_classes, *numbers)
        hidden = _hidden_in_parts(head, num_classes)
        return AtEachPosition(head, block.channel_axis, classes_last=True, hidden=hidden)

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


# The heads of classes of a sample, by name.
GOODNESSES: dict[str, Maker] = {
    "sff": _convolution,
    "cwc": _channelwise,
    "cosine": _cosine,
    "mlp": _hidden_layer,
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
    },
    "number": {"sff": _readout, "mlp": _readout_of_hidden},
    "pixel": {
        "sff": _of_pixels,
        "cwc": _at_each_pixel(_flat_channelwise),
        "cosine": _at_each_pixel(_flat_cosine),
        "mlp": _at_each_pixel(_flat_hidden_layer),
    },
    "token": {
        "sff": _of_tokens,
        "cwc": _at_each_token(_flat_channelwise),
        "cosine": _at_each_token(_flat_cosine),
        "mlp": _at_each_token(_flat_hidden_layer),
        "shared": _shared_output,
    },
}

_FORMS_OF_SAMPLES = ("sample", "labels", "number")

# The numbers that a name may have in brackets, as "mlp(128, 2)" has, and their defaults.
NUMBERS: dict[str, tuple[int, ...]] = {
    "sff": (),
    "cwc": (),
    "cosine": (REGIONS,),
    "mlp": (HIDDEN, REGIONS),
    "shared": (),
}

EXAMPLES = ("sff", "cwc", "cosine", "cosine(4)", "mlp", "mlp(256)", "mlp(256, 4)", "shared")

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
        f"there is no goodness {goodness!r}. Hint: choose one of {names}, "
        "or pass a callable (block, num_classes) -> nn.Module"
    )


def goodness_maker(options: Options, task: Task | None = CLASSIFICATION) -> GoodnessMaker:
    """Return the callable that makes the head of a block.

    Args:
        options: of the cut.
        task: of the model; None while it is not known, which accepts the names of every task.

    Raises:
        InputError: there is no such goodness, it has no form for the task, or it has no use for an
            option.
    """
    if options.objective.goodness is None:
        return options.objective.make_head
    goodness = options.goodness
    if isinstance(goodness, nn.Module):
        raise InputError(
            f"goodness is a module, {type(goodness).__name__}, but each block has a head of its "
            "own. Hint: pass a callable (block, num_classes) -> nn.Module"
        )
    check_kernel_size(options.kernel_size, spatial=0)
    if isinstance(goodness, str) and goodness == "sff":
        return partial(_makers(task)["sff"], kernel_size=options.kernel_size)
    if callable(goodness):
        require_callable("goodness", goodness, ("block", "num_classes"))
        maker = goodness
    else:
        maker = _named(goodness, task)
    if options.kernel_size != 1:
        raise InputError(
            f"kernel_size is {options.kernel_size!r}, but heads of {option_name(goodness)!r} have "
            "no convolution. Hint: leave it out, or goodness='sff'"
        )
    return maker


def _makers(task: Task | None) -> Mapping[str, Maker]:
    """Return the makers of a task's heads by name, those of all forms where it is not known."""
    if task is not None:
        return FORMS[task.form]
    every: dict[str, Maker] = {}
    for makers in FORMS.values():
        every.update(makers)
    return every


def _named(goodness: str, task: Task | None) -> GoodnessMaker:
    name, numbers = parse_goodness(goodness)
    makers = _makers(task)
    if name not in makers:
        known = ", ".join(map(repr, makers))
        raise InputError(
            f"goodness {goodness!r} has no form for sffx.tasks.{task!r}. Hint: {known} have one"
        )
    maker = makers[name]

    def make(block: Block, num_classes: int) -> nn.Module:
        return maker(block, num_classes, *numbers)

    return make


def make_head(
    options: Options, block: Block, num_classes: int, task: Task = CLASSIFICATION
) -> nn.Module:
    """Return the head of one block; of a block that several streams leave, all their heads.

    Raises:
        InputError: there is no such goodness, it cannot be computed for this block, or a callable
            returned no module; names the block.
    """
    if len(block.scored) > 1 and _mixes_channels(options) and share_layers(block):
        head = _make_one(options, side_by_side(block), num_classes, task)
        return SideBySide(head, block.channel_axis)
    heads = []
    for output in block.scored:
        heads.append(_make_one(options, block.seen_from(output), num_classes, task))
    if len(heads) == 1:
        return heads[0]
    return StreamHeads(heads, [bool(output.mask) for output in block.scored])


def _mixes_channels(options: Options) -> bool:
    """Return whether a goodness of this name is computed from all channels of a value."""
    goodness = options.goodness
    if options.objective.goodness is None or not isinstance(goodness, str):
        return False
    return goodness.partition("(")[0] in _MIXING


def _make_one(options: Options, block: Block, num_classes: int, task: Task) -> nn.Module:
    maker = goodness_maker(options, task)
    place = f"{block.target} ({block.name}, output {block.shape})"
    # Where each position has scores of its own, instances are positions as well.
    is_folded = block.is_folded and task.form in _FORMS_OF_SAMPLES
    if is_folded and options.objective.goodness is None:
        raise InputError(
            f"{place}: it holds instances of samples, which the objective "
            f"{options.objective.name!r} cannot score. Hint: objective='sff'"
        )
    try:
        head = maker(_of_one_instance(block) if is_folded else block, num_classes)
    except InputError as cause:
        raise InputError(f"{place}: {cause}") from cause
    if not isinstance(head, nn.Module):
        raise InputError(
            f"{place}: goodness {option_name(options.goodness)} returned a {type(head).__name__}, "
            "not a torch.nn.Module. Hint: return the head, which is called as head(y)"
        )
    require_identity(head)
    require_mask_argument(head, block, f"{place}: goodness {option_name(options.goodness)}")
    return InstanceMean(head) if is_folded else head


def _of_one_instance(block: Block) -> Block:
    """Return a block whose output is one instance of a sample."""
    axis = block.channel_axis - 1
    return replace(block, shape=block.shape[1:], channel_axis=axis, is_folded=False)


def make_heads(plan: BlockPlan, root: nn.Module) -> list[nn.Module]:
    """Return the head of each block, on the device and in the dtype of the model's parameters.

    Raises:
        InputError: as `make_head`.
    """
    # Integer parameters do not have the dtype of a model.
    like = next(p for p in root.parameters() if p.is_floating_point())
    heads = []
    for block in plan:
        head = make_head(plan.options, block, plan.num_classes, plan.task)
        heads.append(head.to(like.device, like.dtype))
    modules = plan.classifier.modules
    last = root.get_submodule(modules[-1]) if modules else None
    connect(heads, last, plan.num_classes)
    return heads
