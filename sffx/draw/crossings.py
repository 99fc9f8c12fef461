"""Values that blocks read from outside, besides the normalised output of the block before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sffx.blocks import BlockPlan


@dataclass(frozen=True)
class Crossing:
    """Values with the same source and the same readers, which are drawn together.

    Attributes:
        names: of the values.
        source: name of the node in the drawing that they come from.
        stage: index of the block that computes them, -1 if no block does.
        readers: indices of the blocks that read them; the classifier's is the last.
        detached: whether the cut stops a gradient that they carry.
        normed: whether they are normalised as well, as values that take paths across a cut are.
    """

    names: tuple[str, ...]
    source: str
    stage: int
    readers: tuple[int, ...]
    detached: bool
    normed: bool = False

    @property
    def in_brackets(self) -> str:
        """What happens to the values at the cut, behind their names: " (detached)"."""
        if self.normed:
            return " (detached, normed)"
        return " (detached)" if self.detached else ""

    @property
    def is_from_outside(self) -> bool:
        """Whether no block computes the values, as for an input of the model."""
        return self.stage < 0

    @property
    def kind(self) -> str:
        """The class of its edges: "input", "side" or "side detached"."""
        if self.is_from_outside:
            return "input"
        return "side detached" if self.detached else "side"


def crossings(plan: BlockPlan) -> list[Crossing]:
    """Return the side values that cross a cut, and the values that come from outside the blocks."""
    groups: dict[Crossing, list[str]] = {}
    # A dict has each value once, in the order in which the blocks read them.
    read: dict[str, None] = {}
    for block in plan.all_blocks:
        read.update(dict.fromkeys(block.inputs))
    for name in read:
        key = _crossing(name, plan)
        if key.readers:
            groups.setdefault(key, []).append(name)
    crossed = []
    for key, names in groups.items():
        crossed.append(replace(key, names=tuple(names)))
    return crossed


def side_kinds(crossed: Iterable[Crossing]) -> set[str]:
    """Return the kinds of side values among crossings, by the kinds of the legend."""
    inner = [crossing for crossing in crossed if not crossing.is_from_outside]
    return {"detached" if crossing.detached else "side" for crossing in inner}


def _crossing(name: str, plan: BlockPlan) -> Crossing:
    """Return the crossing of one value, without the value's name.

    So values with the same source and the same readers have equal crossings.
    """
    stage = _stage_of(name, plan)
    found = []
    for index, block in enumerate(plan.all_blocks):
        is_own = index == stage
        # The cut itself is drawn from a block to the next one.
        if name in block.inputs and not is_own and not _is_handed_on(name, stage, index, plan):
            found.append(index)
    readers = tuple(found)
    if stage < 0:
        return Crossing((), outside_node(name, plan), stage, readers, detached=False)
    block = plan.blocks[stage]
    # An output that a block further on reads carries a gradient, as every output does.
    detached = name == block.output or name in block.detached
    is_output = any(output.name == name for output in block.outputs)
    normed = is_output and plan.options.norm != "none"
    return Crossing((), block.target, stage, readers, detached, normed)


def _stage_of(name: str, plan: BlockPlan) -> int:
    """Return the index of the block that gives a value to later blocks, -1 if none does."""
    for index, block in enumerate(plan.blocks):
        if name == block.output or name in block.sides:
            return index
    return -1


def is_read_by_next(index: int, plan: BlockPlan) -> bool:
    """Return whether the next block reads the output of a feature block.

    It does not where streams run side by side, and the next block begins another stream.
    """
    return plan.blocks[index].output in plan.all_blocks[index + 1].inputs


def _is_handed_on(name: str, stage: int, reader: int, plan: BlockPlan) -> bool:
    """Return whether a value is the output of a block that the next block reads over the cut."""
    return stage >= 0 and reader == stage + 1 and name == plan.blocks[stage].output


def outside_node(name: str, plan: BlockPlan) -> str:
    """Return the node of a value that no block computes: a model input's, or one of its own."""
    for value in plan.inputs:
        # A block may read an input by another name than that of the argument.
        if name == (value.value or value.name):
            return f"input_{value.name}"
    return f"value_{name}"
