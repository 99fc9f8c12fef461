"""Residual blocks: modules that own a place where paths join by a sum or a concatenation."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from itertools import accumulate
from typing import Any

from torch import nn

from sffx.compiler.analyse import Analysis
from sffx.compiler.layers import holds_several_layers
from sffx.compiler.qualnames import holders, outermost
from sffx.compiler.spans import Steps, has_weight, legal_before, legal_behind, settled
from sffx.compiler.steps import Step


def residual_blocks(analysis: Analysis) -> dict[int, int]:
    """Return the residual blocks, {index of the first step: index of the last step}, in order.

    A join inside a unit (a module that is a block as a whole) belongs to the unit. Another join,
    written in the forward of the model, of a stack or of a `Sequential`, is a block of its own.
    """
    joins = {}
    for i, step in enumerate(analysis.steps):
        if step.join in ("sum", "cat") and step.trainable:
            joins[i] = step
    kinds = _unit_kinds(analysis, joins)
    ends: dict[int, int] = {}
    inside: set[int] = set()
    for indices in _unit_steps(analysis, kinds):
        first = indices[0]
        ends[first] = indices[-1]
        inside.update(indices)
    for i, step in joins.items():
        is_unit = analysis.kind(step.scope) in kinds
        if i not in inside and not is_unit:
            ends[i] = i
    return dict(sorted(ends.items()))


def _unit_kinds(analysis: Analysis, joins: dict[int, Step]) -> set[type[nn.Module]]:
    """Return the classes of modules that are residual blocks as a whole.

    A unit owns a join, or is a leaf with several layers, which may hide joins. A stack is none: in
    a stack the same parts follow one another. So a transformer's block with two different sums is a
    unit, and a decoder whose forward adds a skip connection after each of its equal stages is a
    stack.

    Args:
        analysis: of the model.
        joins: the steps that join paths, by index.
    """
    # The forms of the joins of each owner, by what they read: several uses of the same layers are
    # one part.
    parts: dict[str, dict[frozenset[str], Any]] = {}
    for step in joins.values():
        parts_of_owner = parts.setdefault(step.scope, {})
        parts_of_owner[_parameters(analysis, step)] = _form(analysis, step)
    scopes = _scopes(analysis)
    owners = {*parts, *_leaves_with_layers(analysis)}
    units: set[type[nn.Module]] = set()
    stacks: set[type[nn.Module]] = set()
    # Innermost owners first, since units are parts of what holds them.
    for owner in sorted(owners, key=lambda name: (-name.count("."), name)):
        kind = analysis.kind(owner)
        if owner == "" or issubclass(kind, nn.Sequential):
            continue
        own = list(parts.get(owner, {}).values())
        # Another module may have made this class a unit. Then the owner would be the outermost unit
        # here, and hide those inside it.
        units_inside = _units_inside(analysis, owner, units - {kind}, scopes)
        of_stacks = _joins_of_stacks(analysis, owner, stacks, parts)
        if _repeats([*own, *units_inside, *of_stacks]):
            stacks.add(kind)
        # The only module of its class with several joins is a model written in one forward.
        elif len(own) == 1 or len(_instances(analysis, {kind})) > 1:
            units.add(kind)
    # Modules of one class may differ. If one of them is a stack, all of them are.
    return units - stacks


def _parameters(analysis: Analysis, step: Step) -> frozenset[str]:
    """Return the qualnames of the parameters that a step reads."""
    names: set[str] = set()
    for name in step.nodes:
        names.update(analysis.parameters(analysis.nodes[name]))
    return frozenset(names)


def _form(analysis: Analysis, step: Step) -> Any:
    """Return what a step calls, with the shapes of the parameters; equal for steps that repeat."""
    calls = []
    for name in step.nodes:
        if not analysis.is_path(name):
            continue
        node = analysis.nodes[name]
        module = analysis.module(node)
        called = node.target if module is None else type(module)
        shapes = [tuple(p.shape) for p in analysis.parameters(node).values()]
        calls.append((called, tuple(shapes)))
    return tuple(calls)


def _repeats(parts: list[Any]) -> bool:
    """Return whether most of the parts of a module have an equal one."""
    counts = Counter(parts)
    repeated = [part for part in parts if counts[part] > 1]
    return 2 * len(repeated) > len(parts)


def _leaves_with_layers(analysis: Analysis) -> list[str]:
    """Return the qualnames of the leaves on the spine that hold several layers."""
    leaves = []
    for step in analysis.steps:
        node = analysis.nodes[step.node]
        module = analysis.module(node)
        if module is not None and holds_several_layers(module):
            leaves.append(str(node.target))
    return leaves


def _units_inside(
    analysis: Analysis, owner: str, kinds: set[type[nn.Module]], scopes: set[str]
) -> list[Any]:
    """Return the class of each unit inside a module, if whole steps lie in the unit.

    Args:
        analysis: of the model.
        owner: the module.
        kinds: the classes of units.
        scopes: the modules that whole steps lie in.
    """
    units: list[Any] = []
    for name in _instances(analysis, kinds):
        if name in scopes and owner in holders(name):
            units.append(analysis.kind(name))
    return units


def _joins_of_stacks(
    analysis: Analysis,
    owner: str,
    stacks: set[type[nn.Module]],
    parts: dict[str, dict[frozenset[str], Any]],
) -> list[Any]:
    """Return the forms of the joins that the stacks inside a module own.

    Args:
        analysis: of the model.
        owner: the module.
        stacks: the classes of stacks.
        parts: the forms of the joins of each owner.
    """
    joins: list[Any] = []
    for stack, own in parts.items():
        if owner in holders(stack) and analysis.kind(stack) in stacks:
            joins += own.values()
    return joins


def _scopes(analysis: Analysis) -> set[str]:
    """Return the qualnames of the modules that whole steps lie in."""
    scopes: set[str] = set()
    for step in analysis.steps:
        scopes.update([step.scope, *holders(step.scope)])
    return scopes


def _unit_steps(analysis: Analysis, kinds: set[type[nn.Module]]) -> list[list[int]]:
    """Return for each module of these classes the indices of its steps."""
    units = set(_instances(analysis, kinds))
    inside: dict[str, list[int]] = {}
    for i, step in enumerate(analysis.steps):
        # No unit lies in another, so there is at most one around a step.
        for scope in (step.scope, *holders(step.scope)):
            if scope in units:
                inside.setdefault(scope, []).append(i)
    return list(inside.values())


def _instances(analysis: Analysis, kinds: set[type[nn.Module]]) -> list[str]:
    """Return the qualnames of the modules of these classes, outermost ones only."""
    names = []
    for name, candidate in analysis.trace.root.named_modules():
        if name and type(candidate) in kinds:
            names.append(name)
    return outermost(names)


def residual_ends(steps: Steps, blocks: dict[int, int]) -> set[int]:
    """Return the end of each residual block, moved to a step that a cut may follow."""
    starts = list(blocks)
    # The last step of each block and of all blocks before it, which may hold it.
    reached = list(accumulate(blocks.values(), max))
    ends = set()
    for start, end in blocks.items():
        whole = settled(steps, end)
        place = legal_before(steps, whole, start - 1)
        is_legal = not steps[place].refusal
        if is_legal:
            ends.add(place)
            continue
        # A layer that is used again and again (ALBERT) is one block with all its uses. So the block
        # goes on to the next legal step, unless that step is in another block.
        behind = legal_behind(steps, whole)
        if behind is not None:
            last_block = bisect_right(starts, behind) - 1
            if behind >= reached[last_block]:
                place = behind
        ends.add(place)
    return ends


def cut_between(steps: Steps, ends: list[int], start: int) -> None:
    """Add a cut before a residual block if there is a weight between it and the cut before it.

    So a stem and a downsampling layer are blocks of their own.

    Args:
        steps: of the model.
        ends: the cuts so far, in order; may get another.
        start: the first step of the residual block.
    """
    place = bisect_left(ends, start)
    before = ends[place - 1] if place else -1
    if has_weight(steps, before + 1, start):
        ends.insert(place, legal_before(steps, start - 1, before))


def tail_end(steps: Steps, last: int) -> int:
    """Return the end of the block after the last residual block; `last` if there is none.

    Such a block is a convolution before the pool, as in MobileNet.
    """
    weighted = [i for i, step in enumerate(steps) if step.weighted]
    classifier = weighted[-1] if weighted else -1
    end = last
    for i in range(last + 1, classifier):
        is_flat = len(steps[i].shape) < 2
        if steps[i].pools or is_flat:
            break
        if steps[i].weighted:
            end = i
    return end if end == last else settled(steps, end)
