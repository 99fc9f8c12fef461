"""Names, numbers and phrases as pictures and pages show them."""

from __future__ import annotations

from collections.abc import Sequence

from sffx.blocks import Block, BlockPlan, Options, option_name
from sffx.draw.style import NAME_WIDTH
from sffx.learning.named_heads import REGIONS, parse_goodness
from sffx.plan_table import blocks_in_words
from sffx.tables import short_byte_size, short_number
from sffx.tasks import CLASSIFICATION, Task

# Stands in the name of several modules or blocks, between the first and the last.
JOINT = " … "


def cut_in_words(options: Options) -> str:
    """Return what a cut does to a value: "detach · layer norm"."""
    norm = option_name(options.norm)
    return "detach" if norm == "none" else f"detach · {norm} norm"


# Stands between two blocks in the place of the cut, where no value goes from one to the other.
NOT_READ = "not read by the next block"


def heads_in_words(options: Options, task: Task = CLASSIFICATION) -> str:
    """Return the kind of the heads: "SFF", "SFF, kernels of 3", or the name of a callable."""
    if options.objective.goodness is None:
        return options.objective.in_words
    if not isinstance(options.goodness, str):
        return option_name(options.goodness)
    name, numbers = parse_goodness(options.goodness)
    if name == "shared":
        return "the model's output layer behind an adapter"
    if not task.has_goodness:
        return _readout_in_words(name, numbers)
    if name == "cwc":
        return "CwC: groups of channels, no parameters"
    if name == "cosine":
        return f"cosine: a direction for each class{_regions_in_words(numbers[-1])}"
    if name == "mlp":
        layer = f"a hidden layer of {numbers[0]} units"
        return f"cosine after {layer}{_regions_in_words(numbers[-1])}"
    if name == "auto":
        return "cosine after a hidden layer, sized by block"
    if options.kernel_size > 1:
        return f"SFF, kernels of {options.kernel_size}"
    return "SFF"


def _readout_in_words(name: str, numbers: Sequence[int]) -> str:
    """Return the kind of the heads of numbers, given the name of the goodness and its numbers."""
    if name == "mlp":
        layer = f"a hidden layer of {numbers[0]} units"
        return f"linear readout after {layer}{_regions_in_words(numbers[-1])}"
    if name == "auto":
        return "linear readout after a hidden layer, sized by block"
    return "linear readout"


def _regions_in_words(regions: int) -> str:
    return "" if regions == REGIONS else f", {regions} x {regions} regions"


def head_in_words(block: Block, plan: BlockPlan) -> list[str]:
    """Return what a head scores and how: ["10 classes", "of 2 streams", "hidden layer", ...]."""
    streams = [f"of {len(block.scored)} streams"] if len(block.scored) > 1 else []
    count = plan.task.count_in_words(plan.num_classes)
    return [count, *streams, *_head_kind(block, plan)]


def _head_kind(block: Block, plan: BlockPlan) -> list[str]:
    """Return words on how a head computes the goodness, one text a line, or none."""
    options = plan.options
    if options.objective.goodness is None:
        return [options.objective.in_words]
    if not isinstance(options.goodness, str):
        return [option_name(options.goodness)]
    # The numbers of "cosine(4)" or "mlp(64, 3)" are in the legend.
    kind = options.goodness.partition("(")[0]
    if kind == "cwc":
        return ["CwC, no parameters"]
    if kind == "cosine":
        return ["cosine"]
    if kind == "shared":
        return ["adapter", "output layer"]
    last = "cosine" if plan.task.has_goodness else "linear readout"
    if kind in ("mlp", "auto"):
        return ["hidden layer", last]
    if not plan.task.has_goodness:
        return [last]
    # An ordinary SFF head needs no words: the legend names it. Kernels of 3 are "3×3" on an image.
    axes = len(block.shape) - 1
    if kind == "sff" and options.kernel_size > 1 and axes:
        size = "×".join([str(options.kernel_size)] * axes)
        return [f"{size} kernels"]
    return []


def prediction_in_words(plan: BlockPlan) -> str:
    """Return how the scores of the heads become a prediction, for the legend."""
    # The last block counts, however many are left out.
    skips = min(plan.objective.skips, len(plan) - 1)
    left_out = ""
    if skips == 1:
        left_out = " but the first"
    elif skips > 1:
        left_out = f" but the first {skips}"
    # Heads of an objective's own may have a goodness without classes, and scores beside it.
    what = "its mean" if plan.objective.goodness is not None else "the mean of the heads' scores"
    return f"{what} over the blocks{left_out} is the prediction"


def classifier_in_words(plan: BlockPlan) -> str:
    """Return how the classifier learns, for the legend."""
    if not plan.objective.trains_classifier:
        return "does not learn"
    scores = "logits" if plan.task.has_goodness else "numbers"
    return f"learns by {plan.task.loss_name} from its own {scores}"


def heading(plan: BlockPlan) -> str:
    """Return the title of a plan: "ResNet: 9 feature blocks and the classifier"."""
    return f"{plan.model}: {blocks_in_words(plan)} and the classifier"


def plan_facts(plan: BlockPlan) -> str:
    """Return the policy, the classes and the total costs of a plan, in one line."""
    kept = [block.activation_bytes for block in plan.all_blocks]
    macs = sum(block.macs for block in plan.all_blocks)
    in_all = short_byte_size(sum(kept))
    in_largest = short_byte_size(max(kept))
    facts = (
        f"policy {plan.policy}",
        plan.task.count_in_words(plan.num_classes),
        f"{short_number(macs)} MACs",
        f"activations kept for one sample: {in_all} in all, {in_largest} in the largest block",
    )
    return " · ".join(facts)


def block_facts(block: Block) -> str:
    """Return the output shape and the costs of a block, in one line."""
    facts = (
        shape_in_words(block.shape),
        f"{short_number(block.num_parameters)} parameters",
        f"{short_number(block.macs)} MACs",
        short_byte_size(block.activation_bytes),
    )
    return " · ".join(facts)


def shape_in_words(shape: Sequence[int]) -> str:
    """Return a shape as "64×56×56", or "scalar"."""
    return "×".join(map(str, shape)) or "scalar"


def printable(text: str) -> str:
    """Return the text with a space in place of every character that does not print."""
    # Graphviz and HTML refuse control characters and halves of surrogate pairs.
    return "".join(character if character.isprintable() else " " for character in text)


def shorten(name: str, width: int) -> str:
    """Return a name of at most `width` characters, shortened from the left.

    Qualified names differ at their ends, so the end stays, behind an ellipsis. It begins after a
    dot if that loses less than half of it. In 18 characters, "features.denseblock1.conv2" is
    "…denseblock1.conv2", and in 12 it is "…conv2".
    """
    if len(name) <= width:
        return name
    # The first character that fits behind the ellipsis.
    first = len(name) - width + 1
    # The first character after a dot from there on, 0 if there is no dot.
    after_dot = name.find(".", first - 1) + 1
    is_near = first <= after_dot <= first + width // 2
    start = after_dot if is_near else first
    return f"…{name[start:]}"


def shorten_block_name(name: str) -> str:
    """Return a block's name that fits its box; in "first … last" both keep their ends.

    What is too long, and lies in one module, names this module once: "encoder.layer.0 … 11".
    """
    first, joint, last = name.partition(JOINT)
    parent, dot, own = last.rpartition(".")
    if len(name) > NAME_WIDTH and dot and first.rpartition(".")[0] == parent:
        last = own
        name = f"{first}{joint}{last}"
    if len(name) <= NAME_WIDTH or not joint:
        return shorten(name, NAME_WIDTH)
    # Each name has half of the room, and what the other one does not need.
    room = NAME_WIDTH - len(joint)
    room_for_first = min(len(first), room // 2)
    last = shorten(last, room - room_for_first)
    first = shorten(first, room - len(last))
    return f"{first}{joint}{last}"
