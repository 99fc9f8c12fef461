"""Policies: functions from an analysed graph to the names of the nodes to cut after.

A policy may be any callable `Analysis -> iterable of node names`; the ones below have names. They choose among the steps of the spine
(see `analyse`), and share three rules:

- What follows a block, has no layer of its own and keeps its shape (an activation) belongs to the block, and so does a BN layer.
- A gate (squeeze-and-excitation: a product of paths) belongs to the layer that it gates.
- The last layer with a weight is the classifier's, with the pool, the flatten and the dropout before it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate, groupby, pairwise

import numpy as np
from torch import nn

from sffx.compiler.analyse import Analysis, Step
from sffx.compiler.qualnames import holders, outermost
from sffx.errors import CutError, InputError

Policy = Callable[[Analysis], Iterable[str]]


def residual(analysis: Analysis) -> list[str]:
    """Cut after every residual block, and after what lies between them and has weights (the stem, downsampling, the last convolution).

    A residual block is the module that owns a place where paths join by a sum or a concatenation: a BasicBlock, an encoder block, an
    Inception module, a dense block. A class of module that is one somewhere is one everywhere in the model. A model that has none is cut
    into BN groups.
    """
    ends = _residual_ends(analysis)
    if not ends:
        return batchnorm(analysis)
    steps = analysis.steps
    last = max(ends.values())
    cuts = sorted(_legal_ends(steps, ends))
    for start in ends:
        place = bisect_left(cuts, start)
        before = cuts[place - 1] if place else -1
        if any(step.weighted for step in steps[before + 1 : start]):
            cuts.insert(place, _legal_before(steps, start - 1, before))
    cuts.append(_tail(steps, _settled(steps, last)))
    return _names(steps, cuts)


def batchnorm(analysis: Analysis) -> list[str]:
    """Cut into BN groups: a layer with its BN, activation and pool. A layer without BN counts while the value has not been flattened."""
    steps = analysis.steps
    starts = _layer_starts(steps)
    groups = [(start, end) for start, end in zip(starts, [*starts[1:], len(steps)], strict=True)]
    flat = _first_pool(steps)
    chosen = [
        (start, end)
        for start, end in groups[:-1]
        if start < flat or any(step.batchnorm for step in steps[start:end])
    ]
    return _names(steps, {_group_end(steps, start, end) for start, end in chosen})


def layer(analysis: Analysis) -> list[str]:
    """Cut after every layer with a weight, its BN and its activation: pure Forward-Forward. The last layer is the classifier."""
    steps = analysis.steps
    return _names(steps, {_settled(steps, start) for start in _layer_starts(steps)[:-1]})


def module(depth: int = 2) -> Policy:
    """Return the policy that makes a block of every module at a depth of the hierarchy; "layer1.0" is at depth 2.

    A module that lies higher and is not part of a deeper one (a stem) is a block as well, if it has weights. What has none, and a BN layer
    whose feeder is the module before, goes with the module before it.

    Raises:
        InputError: the depth is no positive integer.
    """
    check_positive("depth", depth)

    def cut(analysis: Analysis) -> list[str]:
        steps = analysis.steps
        runs = [
            list(run) for _, run in groupby(range(len(steps)), lambda i: _owner(steps[i], depth))
        ]
        weighted = [run for run in runs if any(steps[i].weighted for i in run)]
        return _names(
            steps, {_run_end(steps, run, following[0]) for run, following in pairwise(weighted)}
        )

    return called(cut, f"module({depth})")


def stages(n: int) -> Policy:
    """Return the policy that makes n feature blocks of about the same multiply-adds, out of the BN groups of the model.

    The sum of the squares of the blocks' multiply-adds is the least there is, which keeps the others even where one cannot be divided.

    Raises:
        InputError: n is no positive integer.
    """
    check_positive("n", n)

    def cut(analysis: Analysis) -> list[str]:
        places = group_ends(analysis)
        if n > len(places):
            raise CutError(
                f"stages({n}) asks for more feature blocks than the {len(places)} BN groups of the model. Hint: n <= {len(places)}"
            )
        macs = np.cumsum([analysis.macs(step) for step in analysis.steps], dtype=float)
        chosen = _balanced([0.0, *macs[places]], n)
        return _names(analysis.steps, [places[i - 1] for i in chosen])

    return called(cut, f"stages({n})")


def group_ends(analysis: Analysis) -> list[int]:
    """Return the indices of the steps that end a BN group, or a layer where there is no group."""
    return [analysis.step_of[name] for name in batchnorm(analysis) or layer(analysis)]


def notes(name: str, analysis: Analysis) -> list[str]:
    """Say what a named policy did that its name does not tell."""
    if name == "residual" and not _residual_ends(analysis):
        return ["the model has no residual block, so it is cut into BN groups"]
    return []


def check_positive(name: str, value: object) -> None:
    """Check a parameter of a policy.

    Raises:
        InputError: it is no positive integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}. Hint: pass a positive integer")


def called(policy: Policy, name: str) -> Policy:
    """Give a policy the name by which a plan will call it."""
    policy.__name__ = name
    return policy


def _run_end(steps: tuple[Step, ...], run: list[int], stop: int) -> int:
    """Return the last step of a block that begins as a run of steps and may go on up to `stop`, further only for a BN layer's sake."""
    end = _group_end(steps, max(i for i in run if steps[i].weighted), stop)
    return _settled(steps, end) if steps[end].refusal else end


def _owner(step: Step, depth: int) -> str:
    """Return the module at most this deep that a step lies in, "" for the model itself."""
    return ".".join(step.scope.split(".")[:depth])


def _balanced(cost: list[float], parts: int) -> list[int]:
    """Divide 0 .. len(cost) - 1 into parts so that the sum of the squares of their costs is least, and return the end of each.

    Args:
        cost: what it costs to get from the start to each place, rising.
        parts: how many.
    """
    reached = np.asarray(cost) / max(cost[-1], 1.0)
    squares = np.where(
        np.tri(len(reached), dtype=bool), np.inf, (reached[None, :] - reached[:, None]) ** 2
    )
    best = np.where(np.arange(len(reached)) == 0, 0.0, np.inf)
    sources = []
    for _ in range(parts):
        total = best[:, None] + squares
        sources.append(total.argmin(0))
        best = total.min(0)
    ends = [len(reached) - 1]
    for source in reversed(sources[1:]):
        ends.append(int(source[ends[-1]]))
    return ends[::-1]


def _residual_ends(analysis: Analysis) -> dict[int, int]:
    """Return the residual blocks as {index of the first step: index of the last step}."""
    joins = {
        i: step
        for i, step in enumerate(analysis.steps)
        if step.join in ("sum", "cat") and step.trainable
    }
    owners = Counter(step.scope for step in joins.values())
    kinds = _unit_kinds(analysis, owners)
    units = set(_instances(analysis, kinds))
    inside: dict[str, list[int]] = {}
    for i, step in enumerate(analysis.steps):
        for unit in units.intersection(
            (step.scope, *holders(step.scope))
        ):  # one at most: a unit lies in no other
            inside.setdefault(unit, []).append(i)
    held = {i for indices in inside.values() for i in indices}
    ends = {
        i: i
        for i, step in joins.items()
        if analysis.kind(step.scope) not in kinds and i not in held
    }
    ends |= {indices[0]: indices[-1] for indices in inside.values()}
    return dict(sorted(ends.items()))


def _unit_kinds(analysis: Analysis, owners: Counter[str]) -> set[type[nn.Module]]:
    """Return the classes of modules that are blocks as a whole, of those that own joins. A module that is the only one of its class and
    holds several joins is a model written in one forward, whose joins are blocks of their own."""
    kinds = {owner: analysis.kind(owner) for owner in owners if owner}
    kinds = {owner: kind for owner, kind in kinds.items() if not issubclass(kind, nn.Sequential)}
    single = {kind for owner, kind in kinds.items() if owners[owner] == 1}
    return single | {
        kind for kind in set(kinds.values()) - single if len(_instances(analysis, {kind})) > 1
    }


def _instances(analysis: Analysis, kinds: set[type[nn.Module]]) -> list[str]:
    """Return the qualnames of the modules of these classes, outermost ones only."""
    return outermost(
        name
        for name, module in analysis.trace.root.named_modules()
        if name and type(module) in kinds
    )


def _layer_starts(steps: tuple[Step, ...]) -> list[int]:
    return [i for i, step in enumerate(steps) if step.weighted and step.join != "product"]


def _first_pool(steps: tuple[Step, ...]) -> int:
    """Return the step that starts the way to the classifier; a number past the last step if none does."""
    return next((i for i, step in enumerate(steps) if step.pools), len(steps))


def _group_end(steps: tuple[Step, ...], start: int, end: int) -> int:
    """Return the last step of a group before the way to the classifier begins."""
    stop = next((i for i in range(start + 1, end) if steps[i].pools), end)
    while (
        stop > start + 1
        and steps[stop - 1].drops
        and not any(steps[i].weighted for i in range(stop, len(steps) - 1))
    ):
        stop -= 1
    return _legal_before(steps, stop - 1, start - 1)


def _settled(steps: tuple[Step, ...], end: int) -> int:
    """Move a cut behind what belongs to the block: BN, activations, gates, and whatever must not be parted from it."""
    while end + 1 < len(steps) and _follows(steps[end + 1], steps[end]):
        end += 1
    return end


def _follows(step: Step, before: Step) -> bool:
    is_gate = step.join == "product" and step.shape == before.shape
    only_batchnorm = step.batchnorm and not step.weighted
    return (
        step.keeps_shape
        or is_gate
        or only_batchnorm
        or (bool(before.refusal) and not step.trainable)
    )


def _tail(steps: tuple[Step, ...], last: int) -> int:
    """Return the end of the block after the last residual block, a convolution before the pool as in MobileNet; `last` if there is none."""
    weighted = [i for i, step in enumerate(steps) if step.weighted]
    stop = next(
        (i for i in range(last + 1, len(steps)) if steps[i].pools or len(steps[i].shape) < 2),
        len(steps),
    )
    features = [i for i in weighted[:-1] if last < i < stop]
    return _settled(steps, features[-1]) if features else last


def _legal_before(steps: tuple[Step, ...], end: int, floor: int) -> int:
    """Return the last step up to `end`, and after `floor`, that a cut may follow; `end` if none may."""
    return next((i for i in range(end, floor, -1) if not steps[i].refusal), end)


def _legal_ends(steps: tuple[Step, ...], ends: dict[int, int]) -> set[int]:
    """Return `_legal_before` of each block, or the next step that a cut may follow and that is in no other block: a layer that is used
    again and again (ALBERT) is one block with all its uses."""
    legal = [i for i, step in enumerate(steps) if not step.refusal]
    starts, reached = [*ends], [*accumulate(ends.values(), max)]
    cuts = set()
    for start, end in ends.items():
        settled = _settled(steps, end)
        before = _legal_before(steps, settled, start - 1)
        place = bisect_right(legal, settled)
        behind = legal[place] if place < len(legal) else before
        is_free = behind >= reached[bisect_right(starts, behind) - 1]
        cuts.add(behind if steps[before].refusal and is_free else before)
    return cuts


def _names(steps: tuple[Step, ...], cuts: Iterable[int]) -> list[str]:
    return [steps[i].node for i in sorted(set(cuts)) if i >= 0 and not steps[i].refusal]
