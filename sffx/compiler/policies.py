"""Policies: where to cut a model.

A policy is a function of the analysed graph and the options of the cut. It returns `Cuts`. The
policies below choose among the steps of the spine (see `analyse`) and share three rules:

- An activation after a block belongs to the block: it has no layer of its own and keeps the shape.
  So does a BN layer.
- A gate (squeeze-and-excitation, a product of paths) belongs to the layer that it gates.
- The last layer with a weight is the classifier's, with the pool, the flatten and the dropout
  before it.

In this file a place in the model is the index of a step, and a cut is made after a step.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from torch import nn

from sffx.blocks import Options
from sffx.compiler.analyse import Analysis, Step
from sffx.compiler.qualnames import holders, outermost
from sffx.errors import CutError, InputError

NO_RESIDUAL_BLOCK = "the model has no residual block, so it is cut into BN groups"


@dataclass(frozen=True)
class Cuts:
    """The choice of a policy.

    Attributes:
        after: names of the nodes to cut after.
        notes: sentences for the reader of the plan.
    """

    after: tuple[str, ...]
    notes: tuple[str, ...] = ()


Policy = Callable[[Analysis, Options], Cuts]


def select(analysis: Analysis, policy: Callable[..., Any], options: Options) -> Cuts:
    """Return the cuts that a policy chooses, checked, in the order of the model.

    Args:
        analysis: of the traced model.
        policy: a `Policy`, or a function of the user's own. That one takes `(analysis)` or
            `(analysis, options)`, and returns `Cuts` or an iterable of node names.
        options: of the cut.

    Raises:
        InputError: the policy takes other arguments, or returns something else.
        CutError: the policy chose no node, or a node after which no cut can lie.
    """
    arguments = (analysis, options) if _takes_options(policy) else (analysis,)
    chosen = policy(*arguments)
    cuts = chosen if isinstance(chosen, Cuts) else Cuts(_node_names(chosen))
    return Cuts(analysis.require(cuts.after), cuts.notes)


def residual(analysis: Analysis, options: Options) -> Cuts:
    """Cut after each residual block, and after whatever has weights between two of them.

    The stem, a downsampling layer and the last convolution lie between. A residual block is the
    module that owns a place where paths join by a sum or a concatenation: a BasicBlock, an encoder
    block, an Inception module, a dense block. A class of modules that is a residual block in one
    place is one everywhere in the model. A model without residual blocks is cut into BN groups.
    """
    blocks = _residual_blocks(analysis)
    if not blocks:
        groups = batchnorm(analysis, options)
        return Cuts(groups.after, (NO_RESIDUAL_BLOCK,))
    steps = analysis.steps
    cuts = sorted(_legal_ends(steps, blocks))
    for start in blocks:
        _cut_before(steps, cuts, start)
    last = max(blocks.values())
    cuts.append(_tail(steps, _settled(steps, last)))
    return _cuts(steps, cuts)


def batchnorm(analysis: Analysis, options: Options) -> Cuts:
    """Cut into BN groups: a layer with its BN, activation and pool.

    A layer without BN is a group as well, while the value has not been flattened.
    """
    return _cuts(analysis.steps, _batch_norm_ends(analysis.steps))


def layer(analysis: Analysis, options: Options) -> Cuts:
    """Cut after each layer with a weight, its BN and its activation: pure Forward-Forward.

    The last layer is the classifier.
    """
    return _cuts(analysis.steps, layer_ends(analysis))


def module(depth: int = 2) -> Policy:
    """Return the policy that makes a block of each module at a depth of the hierarchy.

    "layer1.0" is at depth 2. A module that lies higher and holds none at this depth (a stem) is a
    block as well, if it has weights. A module without weights goes with the module before it. So
    does a BN layer that the module before it feeds.

    Raises:
        InputError: the depth is no positive integer.
    """
    require_positive("depth", depth)

    def cut(analysis: Analysis, options: Options) -> Cuts:
        steps = analysis.steps
        runs = [run for run in _runs(steps, depth) if any(steps[i].weighted for i in run)]
        ends = [_run_end(steps, run, following[0]) for run, following in pairwise(runs)]
        return _cuts(steps, ends)

    return named(cut, f"module({depth})")


def stages(n: int) -> Policy:
    """Return the policy that joins the model's BN groups into n blocks of similar multiply-adds.

    It minimises the sum of the squares of the blocks' multiply-adds. This keeps the other blocks
    even where one group is too large to be divided.

    Raises:
        InputError: n is no positive integer.
    """
    require_positive("n", n)

    def cut(analysis: Analysis, options: Options) -> Cuts:
        ends = group_ends(analysis)
        if n > len(ends):
            raise CutError(
                f"stages({n}) asks for more feature blocks than the {len(ends)} BN groups of the "
                f"model. Hint: n <= {len(ends)}"
            )
        macs = np.cumsum([analysis.macs(step) for step in analysis.steps], dtype=float)
        chosen = _balanced([0.0, *macs[ends]], n)
        return _cuts(analysis.steps, [ends[i - 1] for i in chosen])

    return named(cut, f"stages({n})")


def group_ends(analysis: Analysis) -> list[int]:
    """Return the steps that end a BN group; those that end a layer where there is no group."""
    return _legal(analysis.steps, _batch_norm_ends(analysis.steps)) or layer_ends(analysis)


def layer_ends(analysis: Analysis) -> list[int]:
    """Return the steps that end a layer with its BN and its activation, but the classifier's."""
    steps = analysis.steps
    return _legal(steps, [_settled(steps, start) for start in _layer_starts(steps)[:-1]])


def require_positive(name: str, value: object) -> None:
    """Raise an InputError unless the parameter of a policy is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is {value!r}. Hint: pass a positive integer")


def named(policy: Policy, name: str) -> Policy:
    """Return a policy after giving it the name that a plan will print."""
    policy.__name__ = name
    return policy


def _takes_options(policy: Callable[..., Any]) -> bool:
    """Return whether a policy is called with the options besides the analysis.

    It is where it has two parameters without a default, or one that is called `options`.
    """
    try:
        parameters = inspect.signature(policy).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in places if p.default is p.empty]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(required) > 2 or keyword_only or not (places or variadic):
        raise InputError(
            f"the policy takes {inspect.signature(policy)}. "
            "Hint: a policy takes (analysis) or (analysis, options)"
        )
    return len(required) == 2 or any(p.name == "options" for p in places[1:2])


def _node_names(chosen: Any) -> tuple[str, ...]:
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise InputError(
            f"the policy returned a {type(chosen).__name__}. "
            "Hint: return the names of the nodes to cut after, as a list"
        )
    return tuple(chosen)


def _legal(steps: tuple[Step, ...], ends: Iterable[int]) -> list[int]:
    """Return those of the steps that a cut may follow, in order, each once."""
    return [i for i in sorted(set(ends)) if i >= 0 and not steps[i].refusal]


def _cuts(steps: tuple[Step, ...], ends: Iterable[int]) -> Cuts:
    return Cuts(tuple(steps[i].node for i in _legal(steps, ends)))


# Residual blocks


def _residual_blocks(analysis: Analysis) -> dict[int, int]:
    """Return the residual blocks, {index of the first step: index of the last step}, in order.

    A join inside a unit (a module that is a block as a whole) belongs to the unit. Another join,
    written in the model's own forward or in a `Sequential`, is a block of its own.
    """
    joins = {}
    for i, step in enumerate(analysis.steps):
        if step.join in ("sum", "cat") and step.trainable:
            joins[i] = step
    kinds = _unit_kinds(analysis, Counter(step.scope for step in joins.values()))
    ends: dict[int, int] = {}
    inside: set[int] = set()
    for indices in _unit_steps(analysis, kinds):
        ends[indices[0]] = indices[-1]
        inside.update(indices)
    for i, step in joins.items():
        if i not in inside and analysis.kind(step.scope) not in kinds:
            ends[i] = i
    return dict(sorted(ends.items()))


def _unit_kinds(analysis: Analysis, joins: Counter[str]) -> set[type[nn.Module]]:
    """Return the classes of modules that are residual blocks as a whole.

    A module with several joins is one if there are others of its class. The only one of its class
    is a model written in one forward.

    Args:
        analysis: of the model.
        joins: how many joins each module owns, by its qualname.
    """
    kinds: set[type[nn.Module]] = set()
    for owner, count in joins.items():
        kind = analysis.kind(owner)
        if owner == "" or issubclass(kind, nn.Sequential):
            continue
        if count == 1 or len(_instances(analysis, {kind})) > 1:
            kinds.add(kind)
    return kinds


def _unit_steps(analysis: Analysis, kinds: set[type[nn.Module]]) -> list[list[int]]:
    """Return for each module of these classes the indices of its steps."""
    units = set(_instances(analysis, kinds))
    inside: dict[str, list[int]] = {}
    for i, step in enumerate(analysis.steps):
        for unit in units.intersection((step.scope, *holders(step.scope))):
            inside.setdefault(unit, []).append(i)  # one unit at most: no unit lies in another
    return list(inside.values())


def _instances(analysis: Analysis, kinds: set[type[nn.Module]]) -> list[str]:
    """Return the qualnames of the modules of these classes, outermost ones only."""
    modules = analysis.trace.root.named_modules()
    return outermost(name for name, module in modules if name and type(module) in kinds)


def _legal_ends(steps: tuple[Step, ...], blocks: dict[int, int]) -> set[int]:
    """Return the end of each residual block, moved to a step that a cut may follow."""
    starts = list(blocks)
    reached = list(accumulate(blocks.values(), max))
    ends = set()
    for start, end in blocks.items():
        settled = _settled(steps, end)
        legal = _legal_before(steps, settled, start - 1)
        if steps[legal].refusal:
            # A layer that is used again and again (ALBERT) is one block with all its uses. So the
            # block goes on to the next legal step, unless that step is in another block.
            behind = _legal_behind(steps, settled)
            if behind is not None and behind >= reached[bisect_right(starts, behind) - 1]:
                legal = behind
        ends.add(legal)
    return ends


def _cut_before(steps: tuple[Step, ...], cuts: list[int], start: int) -> None:
    """Add a cut before a residual block if there is a weight between it and the cut before it."""
    place = bisect_left(cuts, start)
    before = cuts[place - 1] if place else -1
    if any(step.weighted for step in steps[before + 1 : start]):
        cuts.insert(place, _legal_before(steps, start - 1, before))


def _tail(steps: tuple[Step, ...], last: int) -> int:
    """Return the end of the block after the last residual block; `last` if there is none.

    Such a block is a convolution before the pool, as in MobileNet.
    """
    stop = len(steps)
    for i in range(last + 1, len(steps)):
        if steps[i].pools or len(steps[i].shape) < 2:
            stop = i
            break
    weighted = [i for i, step in enumerate(steps) if step.weighted]
    features = [i for i in weighted[:-1] if last < i < stop]
    return _settled(steps, features[-1]) if features else last


# BN groups and layers


def _layer_starts(steps: tuple[Step, ...]) -> list[int]:
    return [i for i, step in enumerate(steps) if step.weighted and step.join != "product"]


def _batch_norm_ends(steps: tuple[Step, ...]) -> list[int]:
    """Return the last step of each BN group. A group begins with a layer; the last is left out."""
    flat = next((i for i, step in enumerate(steps) if step.pools), len(steps))
    ends = []
    for start, following in pairwise(_layer_starts(steps)):
        if start < flat or any(step.batchnorm for step in steps[start:following]):
            ends.append(_group_end(steps, start, following))
    return ends


def _group_end(steps: tuple[Step, ...], start: int, following: int) -> int:
    """Return the last step of a group, which ends before the way to the classifier begins.

    Args:
        steps: of the model.
        start: the first step of the group.
        following: the first step of the group after it.
    """
    stop = next((i for i in range(start + 1, following) if steps[i].pools), following)
    while stop > start + 1 and _is_classifier_dropout(steps, stop - 1):
        stop -= 1
    return _legal_before(steps, stop - 1, start - 1)


def _is_classifier_dropout(steps: tuple[Step, ...], index: int) -> bool:
    """Return whether a step is dropout with no weight after it but the classifier's."""
    return steps[index].drops and not any(step.weighted for step in steps[index + 1 : -1])


# Modules at a depth


def _runs(steps: tuple[Step, ...], depth: int) -> list[list[int]]:
    """Return the runs of neighbouring steps that lie in one module, at most this deep."""
    runs: list[list[int]] = []
    owner = None
    for i, step in enumerate(steps):
        module_of_step = step.scope.split(".")[:depth]
        if module_of_step != owner:
            runs.append([])
            owner = module_of_step
        runs[-1].append(i)
    return runs


def _run_end(steps: tuple[Step, ...], run: list[int], stop: int) -> int:
    """Return the last step of a block that begins as a run of steps and may go on up to `stop`.

    It goes on further only where a BN layer behind it would be parted from its layer.
    """
    last_weighted = max(i for i in run if steps[i].weighted)
    end = _group_end(steps, last_weighted, stop)
    return _settled(steps, end) if steps[end].refusal else end


# The end of a block


def _settled(steps: tuple[Step, ...], end: int) -> int:
    """Return a cut moved behind the steps that belong to the block before it."""
    while end + 1 < len(steps) and _follows(steps[end + 1], steps[end]):
        end += 1
    return end


def _follows(step: Step, before: Step) -> bool:
    """Return whether a step belongs to the block that the step before it is in."""
    is_gate = step.join == "product" and step.shape == before.shape
    is_batch_norm = step.batchnorm and not step.weighted
    is_needed = bool(before.refusal) and not step.trainable
    return step.keeps_shape or is_gate or is_batch_norm or is_needed


def _legal_before(steps: tuple[Step, ...], end: int, floor: int) -> int:
    """Return the last step in (floor, end] that a cut may follow; `end` if none may."""
    return next((i for i in range(end, floor, -1) if not steps[i].refusal), end)


def _legal_behind(steps: tuple[Step, ...], end: int) -> int | None:
    """Return the first step after `end` that a cut may follow."""
    return next((i for i in range(end + 1, len(steps)) if not steps[i].refusal), None)


# Blocks of similar cost


def _balanced(cost: list[float], parts: int) -> list[int]:
    """Divide the places 0 .. len(cost) - 1 into parts and return the place where each ends.

    The sum of the squares of the parts' costs is the least possible. Found by dynamic programming:
    `best[i]` is the least sum for parts that reach from 0 to i.

    Args:
        cost: of everything up to each place, rising.
        parts: how many.
    """
    reached = np.asarray(cost) / max(cost[-1], 1.0)
    squares = (reached[None, :] - reached[:, None]) ** 2
    squares[np.tri(len(reached), dtype=bool)] = np.inf  # a part goes forward, by one place at least
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
