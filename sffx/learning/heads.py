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
goodness is one of "sff", "cosine", "mlp" and "auto", one head compares them (`SideBySide`).

The contract of `norm=` is in `sffx.learning.norms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from sffx.blocks import Block, BlockPlan, GoodnessMaker, GoodnessName, Options, option_name
from sffx.checks import positive_integer, require_callable
from sffx.errors import InputError, first_line
from sffx.learning.convolution import check_kernel_size
from sffx.learning.instances import InstanceMean
from sffx.learning.masks import require_mask_argument
from sffx.learning.named_heads import FORMS, Maker, parse_goodness
from sffx.learning.shared_output import connect
from sffx.learning.stream_heads import SideBySide, StreamHeads, share_layers, side_by_side
from sffx.tasks import CLASSIFICATION, Task
from sffx.tasks.records import require_task
from sffx.tensors import require_identity

# Each score is computed from all channels, of any number. "cwc" gives each class channels of its
# own, and "shared" applies the output layer, which takes the channels of one stream.
_MIXING = ("sff", "cosine", "mlp", "auto")
_FORMS_OF_SAMPLES = ("sample", "labels", "number")


def named_head(
    goodness: GoodnessName | str,
    block: Block,
    num_outputs: int,
    *,
    channels: int | None = None,
    task: Task = CLASSIFICATION,
) -> nn.Module:
    """Return a new head by name, to be a part of your own.

        def behind_a_convolution(block, num_classes):
            layer = nn.Conv2d(block.channels, 32, 1)
            return nn.Sequential(layer, sffx.named_head("mlp", block, num_classes, channels=32))

        net = sffx.transform(model, goodness=behind_a_convolution)

    Args:
        goodness: a name that `transform` takes, but "shared".
        block: whose output the head reads.
        num_outputs: J, the number of classes, labels or numbers.
        channels: of what the head reads, where that is not what the block gives.
        task: of the model.

    Raises:
        InputError: there is no such head, it has no form for the task, or cannot read the output.
    """
    if isinstance(goodness, str) and goodness == "shared":
        raise InputError(
            "the head 'shared' reads the output layer of the model, which only transform can hand "
            "to it. Hint: transform(..., goodness='shared'), or another head"
        )
    if not isinstance(block, Block):
        raise InputError(
            f"block is a {type(block).__name__}, not a block. Hint: pass the one that your "
            "goodness is called with, or one of sffx.plan(model)"
        )
    positive_integer("num_outputs", num_outputs, "pass the number of classes")
    require_task(task)
    maker = _named(goodness, task)
    if channels is not None:
        positive_integer("channels", channels, "pass a positive integer, or leave it out")
        block = _with_channels(block, channels)
    try:
        return maker(block, num_outputs)
    except (TypeError, RuntimeError) as cause:  # of torch, which cannot hold such a weight
        raise InputError(
            f"there is no room for a head of {num_outputs} outputs that reads {block.channels} "
            f"channels: {first_line(cause)}. Hint: pass smaller numbers"
        ) from cause


def _with_channels(block: Block, channels: int) -> Block:
    """Return a block whose output has another number of channels."""
    shape = list(block.shape)
    shape[block.channel_axis - 1] = channels
    return replace(block, shape=tuple(shape))


def goodness_maker(options: Options, task: Task | None = CLASSIFICATION) -> GoodnessMaker:
    """Return the callable that makes the head of a block.

    Args:
        options: of the cut.
        task: of the model; None while it is not known, which accepts the names of every task.

    Raises:
        InputError: there is no such goodness, it has no form for the task, or it has no use for an
            option.
    """
    goodness = options.goodness
    if options.objective.goodness is None:
        _require_no_kernel(options)
        return options.objective.make_head
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
    _require_no_kernel(options)
    return maker


def _require_no_kernel(options: Options) -> None:
    """Raise an InputError if there is a kernel size for heads without a convolution."""
    if options.kernel_size == 1:
        return
    remedy = "or goodness='sff'" if options.objective.goodness is not None else "or objective='sff'"
    raise InputError(
        f"kernel_size is {options.kernel_size!r}, but heads of {option_name(options.goodness)!r} "
        f"have no convolution. Hint: leave it out, {remedy}"
    )


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
