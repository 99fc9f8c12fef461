"""Folding: blocks in a row that look alike become one, so that a deep net fits on a page."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, fields, replace

from sffx.blocks import Block, BlockPlan, Leaf
from sffx.draw.words import JOINT

# Fewer blocks than this are as easy to read one by one.
SHORTEST = 3


@dataclass(frozen=True)
class Run(Block):
    """Blocks in a row with the same modules, shape and cost, as one block with the costs of each.

    Attributes:
        blocks: that it stands for, in order.
    """

    blocks: tuple[Block, ...] = ()


def fold(plan: BlockPlan) -> BlockPlan:
    """Return the plan with a `Run` in place of three or more blocks in a row that look alike.

    A block stays as it is if later blocks than the next one read its values, because folding would
    hide where those come from. Exception: the first block of a run may make a value that only the
    run reads, such as a mask that the first of twelve layers prepares for all.

    Args:
        plan: as `sffx.plan` returns it.

    Returns:
        A plan for drawings. It cannot cut a model.
    """
    blocks: list[Block] = []
    for alike in _groups(plan):
        if len(alike) >= SHORTEST:
            blocks.append(_run(alike))
        else:
            blocks += alike
    return replace(plan, blocks=tuple(blocks))


def _groups(plan: BlockPlan) -> list[list[Block]]:
    """Return the blocks of a plan, in order, with those in a row that look alike in one group."""
    # How many blocks read each value.
    readers: Counter[str] = Counter()
    for block in plan.all_blocks:
        readers.update(set(block.inputs))
    looks: list[tuple[object, ...]] = []
    before: Block | None = None
    chains = 0
    for block in plan:
        if before is not None and before.output not in block.inputs:
            # Another stream begins. As of the first block, nothing enters it from the one before.
            before = None
            chains += 1
        looks.append((chains, *_look(block, before, readers, plan)))
        before = block
    groups: list[list[Block]] = []
    for _, indices in itertools.groupby(range(len(plan)), key=looks.__getitem__):
        alike = [plan.blocks[index] for index in indices]
        if groups and _prepares(groups[-1], alike, readers, plan):
            alike = groups.pop() + alike
        groups.append(alike)
    return groups


def _prepares(
    before: list[Block], alike: list[Block], readers: Counter[str], plan: BlockPlan
) -> bool:
    """Return whether a block looks like those behind it, and makes values that only they read.

    Args:
        before: the group before; only a single block can prepare.
        alike: the blocks behind it.
        readers: how many blocks read each value.
        plan: of all blocks.
    """
    first = before[-1]
    sides = set(first.sides)
    if len(before) > 1 or not sides or readers[first.output] > 1:
        return False
    # A picture shows where a cut stops the gradient of a side value.
    if first.detached:
        return False
    if _features(first, plan) != _features(alike[0], plan):
        return False
    within = {first.output, *sides, *first.inputs}
    if first.output not in alike[0].inputs or not within.issuperset(alike[0].inputs):
        return False
    # Blocks that are alike read the same values besides the output before.
    return all(readers[side] == len(alike) for side in sides)


def first_of(block: Block) -> Block:
    """Return the block itself; for a run, its first block, which stands for the others."""
    return block.blocks[0] if isinstance(block, Run) else block


def last_of(block: Block) -> Block:
    """Return the block itself; for a run, its last block."""
    return block.blocks[-1] if isinstance(block, Run) else block


def leaves_in(block: Block, plan: BlockPlan) -> list[Leaf]:
    """Return the modules of a block that the trace did not look into."""
    leaves = []
    for leaf in plan.leaves:
        # With a dot at the end, because "layer1" is no part of "layer10".
        prefix = f"{leaf.qualname}."
        if any(f"{name}.".startswith(prefix) for name in block.modules):
            leaves.append(leaf)
    return leaves


def relative(qualname: str, block: Block) -> str:
    """Return a qualified name relative to a block.

    It is relative to the block's module. If a block has no module of its own, it is relative to the
    innermost module around all modules of the block.
    """
    if JOINT not in block.name:
        return qualname.removeprefix(f"{block.name}.")
    return qualname.removeprefix(_common_prefix(block.modules))


def _common_prefix(names: tuple[str, ...]) -> str:
    """Return the path of the innermost module around all modules of these names, with its dot."""
    paths = [name.split(".")[:-1] for name in names]
    prefix = ""
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        prefix += f"{level[0]}."
    return prefix


def _look(
    block: Block, before: Block | None, readers: Counter[str], plan: BlockPlan
) -> tuple[object, ...]:
    """Return the features that the blocks of one run have in common.

    A block that cannot be in a run has only its own target as a feature, which no other block has.
    """
    if block.sides or readers[block.output] > 1:
        return (block.target,)
    # The first block reads an input of the model where the others read the output before.
    entering = before.output if before is not None else next(iter(block.inputs), None)
    others = tuple(name for name in block.inputs if name != entering)
    return (others, *_features(block, plan))


def _features(block: Block, plan: BlockPlan) -> tuple[object, ...]:
    """Return what a block holds and costs, whatever it reads."""
    modules = tuple(relative(name, block) for name in block.modules)
    joins = tuple((node.join, node.paths) for node in block.joins)
    untraced = tuple((leaf.kind, leaf.reason) for leaf in leaves_in(block, plan))
    costs = (block.num_parameters, block.macs, block.activation_bytes)
    return (modules, joins, untraced, block.shape, block.channel_axis, costs)


def _run(blocks: list[Block]) -> Run:
    first = blocks[0]
    last = blocks[-1]
    # The costs of the blocks are equal, so those of the first are those of each.
    values = {field.name: getattr(first, field.name) for field in fields(Block)}
    values["name"] = f"{first.name}{JOINT}{last.name}"
    values["output"] = last.output
    # Nothing behind the run reads what its first block makes for the others.
    values["sides"] = ()
    return Run(**values, blocks=tuple(blocks))
