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
Steps = tuple[Step, ...]


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
    chosen = policy(analysis, options) if _takes_options(policy) else policy(analysis)
    cuts = chosen if isinstance(chosen, Cuts) else Cuts(_node_names(chosen))
    after = analysis.require(cuts.after)
    return Cuts(after, cuts.notes)


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
    ends = sorted(_legal_ends(steps, blocks))
    for start in blocks:
        _cut_before(steps, ends, start)
    last = _settled(steps, max(blocks.values()))
    ends.append(_tail(steps, last))
    return _cuts(steps, ends)


def batchnorm(analysis: Analysis, options: Options) -> Cuts:
    """Cut into BN groups: a layer with its BN, activation and pool.

    A layer without BN is a group as well, while the value has not been flattened.
    """
    ends = _batch_norm_ends(analysis.steps)
    return _cuts(analysis.steps, ends)


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
        runs = []
        for run in _runs(steps, depth):
            if _has_weight(steps, run.start, run.stop):
                runs.append(run)
        ends = []
        for run, following in pairwise(runs):
            ends.append(_run_end(steps, run, following.start))
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
        macs_of_steps = [analysis.macs(step) for step in analysis.steps]
        macs_until = np.cumsum(macs_of_steps, dtype=float)
        cost = [0.0, *macs_until[ends]]
        chosen = _balanced(cost, n)
        return _cuts(analysis.steps, [ends[i - 1] for i in chosen])

    return named(cut, f"stages({n})")


def group_ends(analysis: Analysis) -> list[int]:
    """Return the steps that end a BN group; those that end a layer where there is no group."""
    groups = _legal(analysis.steps, _batch_norm_ends(analysis.steps))
    return groups or layer_ends(analysis)


def layer_ends(analysis: Analysis) -> list[int]:
    """Return the steps that end a layer with its BN and its activation, but the classifier's."""
    steps = analysis.steps
    ends = []
    for start in _layer_starts(steps)[:-1]:
        ends.append(_settled(steps, start))
    return _legal(steps, ends)


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
        signature = inspect.signature(policy)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    places = []
    required = []
    can_be_called = False
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            places.append(parameter.name)
        can_be_called = can_be_called or bool(places) or parameter.kind is parameter.VAR_POSITIONAL
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not is_variadic:
            required.append(parameter.name)
    by_keyword = set(required).difference(places)
    if len(required) > 2 or by_keyword or not can_be_called:
        raise InputError(
            f"the policy takes {signature}. Hint: a policy takes (analysis) or (analysis, options)"
        )
    return len(required) == 2 or places[1:2] == ["options"]


def _node_names(chosen: Any) -> tuple[str, ...]:
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise InputError(
            f"the policy returned a {type(chosen).__name__}. "
            "Hint: return the names of the nodes to cut after, as a list"
        )
    return tuple(chosen)


def _legal(steps: Steps, ends: Iterable[int]) -> list[int]:
    """Return those of the steps that a cut may follow, in order, each once."""
    legal = []
    for i in sorted(set(ends)):
        # -1 stands for the start of the model.
        if i >= 0 and not steps[i].refusal:
            legal.append(i)
    return legal


def _cuts(steps: Steps, ends: Iterable[int]) -> Cuts:
    names = [steps[i].node for i in _legal(steps, ends)]
    return Cuts(tuple(names))


def _has_weight(steps: Steps, start: int, stop: int) -> bool:
    """Return whether one of the steps in [start, stop) has a weight."""
    return any(step.weighted for step in steps[start:stop])


def _first_pool(steps: Steps, start: int, stop: int) -> int:
    """Return the step in [start, stop) that starts the way to the classifier; `stop` if none."""
    for i in range(start, stop):
        if steps[i].pools:
            return i
    return stop


# Residual blocks


def _residual_blocks(analysis: Analysis) -> dict[int, int]:
    """Return the residual blocks, {index of the first step: index of the last step}, in order.

    A join inside a unit (a module that is a block as a whole) belongs to the unit. Another join,
    written in the model's own forward or in a `Sequential`, is a block of its own.
    """
    joins = {}
    owners: Counter[str] = Counter()
    for i, step in enumerate(analysis.steps):
        if step.join in ("sum", "cat") and step.trainable:
            joins[i] = step
            owners[step.scope] += 1
    kinds = _unit_kinds(analysis, owners)
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


def _unit_kinds(analysis: Analysis, owners: Counter[str]) -> set[type[nn.Module]]:
    """Return the classes of modules that are residual blocks as a whole.

    Args:
        analysis: of the model.
        owners: how many joins each module owns, by its qualname.
    """
    kinds: set[type[nn.Module]] = set()
    for owner, num_joins in owners.items():
        kind = analysis.kind(owner)
        if owner == "" or issubclass(kind, nn.Sequential):
            continue
        # The only module of its class with several joins is a model written in one forward.
        if num_joins == 1 or len(_instances(analysis, {kind})) > 1:
            kinds.add(kind)
    return kinds


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


def _legal_ends(steps: Steps, blocks: dict[int, int]) -> set[int]:
    """Return the end of each residual block, moved to a step that a cut may follow."""
    starts = list(blocks)
    reached = list(accumulate(blocks.values(), max))
    ends = set()
    for start, end in blocks.items():
        settled = _settled(steps, end)
        legal = _legal_before(steps, settled, start - 1)
        if not steps[legal].refusal:
            ends.add(legal)
            continue
        # A layer that is used again and again (ALBERT) is one block with all its uses. So the block
        # goes on to the next legal step, unless that step is in another block.
        behind = _legal_behind(steps, settled)
        if behind is not None:
            last_block = bisect_right(starts, behind) - 1
            if behind >= reached[last_block]:
                legal = behind
        ends.add(legal)
    return ends


def _cut_before(steps: Steps, ends: list[int], start: int) -> None:
    """Add a cut before a residual block if there is a weight between it and the cut before it.

    Args:
        steps: of the model.
        ends: the cuts so far, in order; may get another.
        start: the first step of the residual block.
    """
    place = bisect_left(ends, start)
    before = ends[place - 1] if place else -1
    if _has_weight(steps, before + 1, start):
        ends.insert(place, _legal_before(steps, start - 1, before))


def _tail(steps: Steps, last: int) -> int:
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
    return end if end == last else _settled(steps, end)


# BN groups and layers


def _layer_starts(steps: Steps) -> list[int]:
    """Return the steps that begin a layer. A gate is none, since it belongs to another layer."""
    starts = []
    for i, step in enumerate(steps):
        is_gate = step.join == "product"
        if step.weighted and not is_gate:
            starts.append(i)
    return starts


def _batch_norm_ends(steps: Steps) -> list[int]:
    """Return the last step of each BN group. A group begins with a layer; the last is left out."""
    flat = _first_pool(steps, 0, len(steps))
    ends = []
    for start, following in pairwise(_layer_starts(steps)):
        has_batch_norm = any(step.batchnorm for step in steps[start:following])
        if start < flat or has_batch_norm:
            ends.append(_group_end(steps, start, following))
    return ends


def _group_end(steps: Steps, start: int, following: int) -> int:
    """Return the last step of a group, which ends before the way to the classifier begins.

    Args:
        steps: of the model.
        start: the first step of the group.
        following: the first step of the group after it.
    """
    stop = _first_pool(steps, start + 1, following)
    while stop > start + 1 and _is_classifier_dropout(steps, stop - 1):
        stop -= 1
    return _legal_before(steps, stop - 1, start - 1)


def _is_classifier_dropout(steps: Steps, index: int) -> bool:
    """Return whether a step is dropout with no weight after it but the classifier's."""
    classifier = len(steps) - 1
    return steps[index].drops and not _has_weight(steps, index + 1, classifier)


# Modules at a depth


def _runs(steps: Steps, depth: int) -> list[range]:
    """Return the runs of neighbouring steps that lie in one module, at most this deep."""
    starts = []
    owner = None
    for i, step in enumerate(steps):
        module_at_depth = step.scope.split(".")[:depth]
        if module_at_depth != owner:
            starts.append(i)
            owner = module_at_depth
    bounds = [*starts, len(steps)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _run_end(steps: Steps, run: range, stop: int) -> int:
    """Return the last step of a block that begins as a run of steps and may go on up to `stop`.

    It goes on further only where a BN layer behind it would be parted from its layer.
    """
    last_weighted = max(i for i in run if steps[i].weighted)
    end = _group_end(steps, last_weighted, stop)
    return _settled(steps, end) if steps[end].refusal else end


# The end of a block


def _settled(steps: Steps, end: int) -> int:
    """Return a cut moved behind the steps that belong to the block before it."""
    for following in range(end + 1, len(steps)):
        if not _follows(steps[following], steps[end]):
            break
        end = following
    return end


def _follows(step: Step, before: Step) -> bool:
    """Return whether a step belongs to the block that the step before it is in."""
    is_gate = step.join == "product" and step.shape == before.shape
    is_batch_norm = step.batchnorm and not step.weighted
    is_needed = bool(before.refusal) and not step.trainable
    return step.keeps_shape or is_gate or is_batch_norm or is_needed


def _legal_before(steps: Steps, end: int, floor: int) -> int:
    """Return the last step in (floor, end] that a cut may follow; `end` if none may."""
    for i in range(end, floor, -1):
        if not steps[i].refusal:
            return i
    return end


def _legal_behind(steps: Steps, end: int) -> int | None:
    """Return the first step after `end` that a cut may follow."""
    for i in range(end + 1, len(steps)):
        if not steps[i].refusal:
            return i
    return None


# Blocks of similar cost


def _balanced(cost: list[float], parts: int) -> list[int]:
    """Divide the places 0 .. len(cost) - 1 into parts and return the place where each ends.

    The sum of the squares of the parts' costs is the least possible. Found by dynamic programming:
    `best[i]` is the least sum for parts that reach from 0 to i.

    Args:
        cost: of everything up to each place, rising.
        parts: how many.
    """
    places = len(cost)
    reached = np.asarray(cost) / max(cost[-1], 1.0)
    part_costs = reached[None, :] - reached[:, None]  # of a part from row to column
    squares = part_costs**2
    # A part goes forward, by one place at least.
    squares[np.tri(places, dtype=bool)] = np.inf
    best = np.full(places, np.inf)
    best[0] = 0.0
    sources = []
    for _ in range(parts):
        total = best[:, None] + squares
        sources.append(total.argmin(0))
        best = total.min(0)
    # The last part ends in the last place. Where it starts, the part before it ends.
    ends = [places - 1]
    for source in reversed(sources[1:]):
        ends.append(int(source[ends[-1]]))
    return ends[::-1]
