"""Folding: neighbouring blocks that look alike become one, so that a deep net fits on a page."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, fields, replace

from sffx.blocks import Block, BlockPlan, Leaf

# Fewer alike are as easily read one by one.
SHORTEST = 3

JOINT = " … "  # in the name of what is not one module or block, between its first and its last


@dataclass(frozen=True)
class Run(Block):
    """Blocks in a row that have the same modules, shape and cost, as one. Its figures are those of each of them.

    Attributes:
        blocks: that it stands for, in order.
    """

    blocks: tuple[Block, ...] = ()


def fold(plan: BlockPlan) -> BlockPlan:
    """The plan with a `Run` in the place of three or more blocks in a row that look alike.

    Blocks whose values a later block reads, besides the next one, are left as they are: folding would hide where they come from.

    Args:
        plan: as `sffx.plan` returns it.

    Returns:
        a plan for drawings, not for a rewrite.
    """
    stages = plan.all_blocks
    readers = Counter(name for stage in stages for name in set(stage.inputs))
    looks = [
        _look(block, before, readers, plan)
        for block, before in zip(plan.blocks, (None, *plan.blocks), strict=False)
    ]
    blocks: list[Block] = []
    for _, group in itertools.groupby(
        zip(looks, plan.blocks, strict=True), key=lambda pair: pair[0]
    ):
        alike = [block for _, block in group]
        blocks += [_run(alike)] if len(alike) >= SHORTEST else alike
    return replace(plan, blocks=tuple(blocks))


def first_of(block: Block) -> Block:
    """The block itself, or the first of a run, which stands for the others."""
    return block.blocks[0] if isinstance(block, Run) else block


def leaves_in(block: Block, plan: BlockPlan) -> list[Leaf]:
    """The modules of a block that the trace did not look into."""
    return [
        leaf
        for leaf in plan.leaves
        if any(f"{name}.".startswith(f"{leaf.qualname}.") for name in block.modules)
    ]


def relative(qualname: str, block: Block) -> str:
    """The qualname as seen from the block: from its module, or from the innermost module around all that it calls."""
    if JOINT not in block.name:
        return qualname.removeprefix(f"{block.name}.")
    paths = [name.split(".")[:-1] for name in block.modules] or [[]]
    around = [
        parts[0]
        for parts in itertools.takewhile(
            lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)
        )
    ]
    return qualname.removeprefix("".join(f"{part}." for part in around))


def _look(block: Block, before: Block | None, readers: Counter[str], plan: BlockPlan) -> object:
    """What blocks of one run have in common; of a block that cannot be in a run, its own target."""
    if block.sides or readers[block.output] > 1:
        return block.target
    modules = tuple(relative(name, block) for name in block.modules)
    # The first block reads an input of the model where the others read the output before.
    handed_on = before.output if before is not None else next(iter(block.inputs), None)
    others = tuple(name for name in block.inputs if name != handed_on)
    cost = (block.num_parameters, block.macs, block.activation_bytes)
    joins = tuple((node.join, node.paths) for node in block.joins)
    untraced = tuple((leaf.kind, leaf.reason) for leaf in leaves_in(block, plan))
    return (modules, joins, others, untraced, block.shape, block.channel_axis, *cost)


def _run(blocks: list[Block]) -> Run:
    first, last = blocks[0], blocks[-1]
    same = {field.name: getattr(first, field.name) for field in fields(Block)}
    return Run(
        **{**same, "name": f"{first.name}{JOINT}{last.name}", "output": last.output},
        blocks=tuple(blocks),
    )
