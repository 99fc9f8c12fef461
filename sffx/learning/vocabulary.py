"""What the paper's heads cost where a model scores a large vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sffx.blocks import Block, Options
from sffx.learning.shared_output import own_parameters
from sffx.tables import short_number
from sffx.tasks import Task

# From so many outputs on the paper's heads have as many parameters as the blocks themselves.
LARGE = 5000


def notes_on_vocabulary(
    blocks: Iterable[Block], num_outputs: int, options: Options, task: Task, last: nn.Module | None
) -> list[str]:
    """Return a note where each block scores a large vocabulary by a head of its own.

    Args:
        blocks: the feature blocks.
        num_outputs: V.
        options: of the cut.
        task: of the model.
        last: the last module of the model, whose weight `goodness="shared"` reads; None if unknown.
    """
    is_papers = isinstance(options.goodness, str) and options.goodness == "sff"
    if task.form != "token" or num_outputs < LARGE or not is_papers:
        return []
    # Another last module has no weight that the blocks could read.
    if not isinstance(last, nn.Linear) or last.out_features != num_outputs:
        return []
    own = 0
    shared = 0
    for block in blocks:
        for output in block.scored:
            channels = block.seen_from(output).channels
            own += num_outputs * (options.kernel_size * channels + 1)
            shared += own_parameters(channels, last.in_features)
    return [
        f"each block scores {num_outputs} tokens, by heads with {short_number(own)} parameters "
        f"together. Hint: with goodness='shared' they have {short_number(shared)}, and read one "
        "copy of the model's output layer"
    ]
