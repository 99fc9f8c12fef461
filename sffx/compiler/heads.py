"""Make the heads that a plan asks for."""

from __future__ import annotations

from torch import nn

from sffx.blocks import BlockPlan
from sffx.errors import InputError
from sffx.learning.heads import make_head


def make_heads(plan: BlockPlan, root: nn.Module) -> list[nn.Module]:
    """Make the head of each block, on the device and in the dtype of the model's parameters.

    Raises:
        InputError: there is no such goodness, or a block has no use for it; names the block.
    """
    like = next(p for p in root.parameters() if p.is_floating_point())
    wanted, heads = plan.heads, []
    for block in plan:
        try:
            shape = (block.channels, plan.num_classes, block.channel_axis, len(block.shape) - 1)
            head = make_head(wanted.goodness, *shape, wanted.kernel_size, wanted.rank)
        except InputError as cause:
            raise InputError(
                f"{block.target} ({block.name}, output {block.shape}): {cause}"
            ) from cause
        heads.append(head.to(like.device, like.dtype))
    return heads
