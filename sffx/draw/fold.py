"""Folding: blocks in a row that look alike become one, so that a deep net fits on a page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

from sffx.blocks import Block, BlockPlan, Leaf
from sffx.draw.words import JOINT

# What blocks of one run have in common.
Features: TypeAlias = tuple[object, ...]

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
    readers = _count_readers(plan)
    rows: list[list[Block]] = []
    look_before: Features | None = None
    for block, look in zip(plan, _looks(plan, readers), strict=True):
        if look != look_before:
            rows.append([])
        rows[-1].append(block)
        look_before = look
    # A block that makes a mask for the others looks different from them, but belongs to them.
    groups: list[list[Block]] = []
    for alike in rows:
        if groups and _prepares(groups[-1], alike, readers, plan):
            groups[-1].extend(alike)
        else:
            groups.append(alike)
    return groups


def _count_readers(plan: BlockPlan) -> Counter[str]:
    """Return how many blocks read each value, the classifier among them."""
    readers: Counter[str] = Counter()
    for block in plan.all_blocks:
        # A block that reads a value twice is one reader.
        readers.update(set(block.inputs))
    return readers


def _looks(plan: BlockPlan, readers: Counter[str]) -> list[Features]:
    """Return a key for each block. Blocks in a row with equal keys look alike."""
    looks: list[Features] = []
    before: Block | None = None
    # Where streams run side by side, the blocks of each are a chain of their own.
    chain = 0
    for block in plan:
        if before is not None and before.output not in block.inputs:
            # Another chain begins. As with the first block, nothing enters from the one before.
            before = None
            chain += 1
        looks.append((chain, *_look(block, before, readers, plan)))
        before = block
    return looks


def _prepares(
    group: list[Block], alike: list[Block], readers: Counter[str], plan: BlockPlan
) -> bool:
    """Return whether a block looks like those behind it, and makes values that only they read.

    Args:
        group: before those blocks. Only a single block can prepare.
        alike: the blocks behind it.
        readers: how many blocks read each value.
        plan: of all blocks.
    """
    if len(group) > 1:
        return False
    (first,) = group
    if not first.sides or readers[first.output] > 1:
        return False
    # A picture shows where a cut stops the gradient of a side value.
    if first.detached:
        return False
    if _features(first, plan) != _features(alike[0], plan):
        return False
    # The next block reads the output of this one, and nothing that this one does not know.
    known = {first.output, *first.sides, *first.inputs}
    if first.output not in alike[0].inputs or not known.issuperset(alike[0].inputs):
        return False
    # So many readers are all of `alike`, since these read the same values besides the output
    # before.
    return all(readers[side] == len(alike) for side in first.sides)


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


def _look(block: Block, before: Block | None, readers: Counter[str], plan: BlockPlan) -> Features:
    """Return the features that the blocks of one run have in common.

    Args:
        block: of the plan.
        before: the block that it reads, None for the first one of a chain.
        readers: how many blocks read each value.
        plan: of all blocks.
    """
    if block.sides or readers[block.output] > 1:
        # It cannot be in a run, so its feature is its target, which no other block has.
        return (block.target,)
    # What enters over the cut differs from block to block. The first block of a chain reads an
    # input of the model in its place.
    first_input = next(iter(block.inputs), "")
    entering = first_input if before is None else before.output
    others = tuple(name for name in block.inputs if name != entering)
    return (others, *_features(block, plan))


def _features(block: Block, plan: BlockPlan) -> Features:
    """Return what a block holds and costs, whatever it reads."""
    modules = [relative(name, block) for name in block.modules]
    joins = [(node.join, node.paths) for node in block.joins]
    untraced = [(leaf.kind, leaf.reason) for leaf in leaves_in(block, plan)]
    return (
        modules,
        joins,
        untraced,
        block.shape,
        block.channel_axis,
        block.num_parameters,
        block.macs,
        block.activation_bytes,
    )


def _run(blocks: list[Block]) -> Run:
    """Return the run that stands for blocks that look alike."""
    first = blocks[0]
    last = blocks[-1]
    # The costs of the blocks are equal, so those of the first are those of each.
    values = {field.name: getattr(first, field.name) for field in fields(Block)}
    values["name"] = f"{first.name}{JOINT}{last.name}"
    values["output"] = last.output
    # Nothing behind the run reads what its first block makes for the others.
    values["sides"] = ()
    return Run(**values, blocks=tuple(blocks))
