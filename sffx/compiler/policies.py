"""Policies: where to cut a model.

A policy is a function of the analysed graph and the options of the cut. It returns `Cuts`. The
policies below choose among the steps of the spine (see `dataflow`) and share the rules of `spans`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sffx.blocks import Options
from sffx.checks import positive_integer
from sffx.compiler.analyse import Analysis
from sffx.compiler.cut_sets import Cut
from sffx.compiler.large_spans import divided
from sffx.compiler.residual import cut_between, residual_blocks, residual_ends, tail_end
from sffx.compiler.spans import (
    Steps,
    batch_norm_ends,
    group_end,
    group_ends,
    has_weight,
    layer_ends,
    legal,
    settled,
)
from sffx.errors import CutError, InputError, shown

NO_RESIDUAL_BLOCK = "the model has no residual block, so it is cut into BN groups"


@dataclass(frozen=True)
class Cuts:
    """The choice of a policy.

    Attributes:
        after: names of the nodes to cut after; a tuple of names where several values cross.
        notes: sentences for the reader of the plan.
    """

    after: tuple[Cut, ...]
    notes: tuple[str, ...] = ()


Policy = Callable[[Analysis, Options], Cuts]


def select(analysis: Analysis, policy: Callable[..., Any], options: Options) -> Cuts:
    """Return the cuts that a policy chooses, checked, in the order of the model.

    Args:
        analysis: of the traced model.
        policy: a `Policy`, or a function of the user's own. That one takes `(analysis)` or
            `(analysis, options)`, and returns `Cuts` or an iterable of cuts.
        options: of the cut.

    Raises:
        InputError: the policy takes other arguments, or returns something else.
        CutError: the policy chose no node, or a node after which no cut can lie.
    """
    chosen = policy(analysis, options) if _takes_options(policy) else policy(analysis)
    cuts = chosen if isinstance(chosen, Cuts) else Cuts(chosen)
    after = analysis.require([_cut(names) for names in _checked(cuts.after)])
    return Cuts(after, _notes(cuts.notes))


def residual(analysis: Analysis, options: Options) -> Cuts:
    """Cut after each residual block, and after whatever has weights between two of them.

    1. A residual block is the module that owns a place where paths join by a sum or a
       concatenation: a BasicBlock, an encoder block, an Inception module, a dense block. It may
       also be a leaf with several layers, which may hide such a place. A stack, in which the same
       parts follow one another, is none. A class of modules that is a residual block in one place
       is one everywhere in the model.
    2. Between two of them lie the stem, a downsampling layer or the last convolution.
    3. A model without residual blocks is cut into BN groups. One without such groups is cut once,
       before its classifier.
    4. Where no residual block lies, several layers that hold more than a third of the parameters
       together are cut from each other. A residual block with more than a third that holds residual
       blocks itself, or goes on behind a concatenation, is cut where single values cross inside.
    5. Where streams run side by side, as in a U-Net, it also cuts between the modules of the
       streams, across all values that cross there (see `streams`).
    """
    steps = analysis.steps
    between_streams = [i for i, step in enumerate(steps) if step.parts_streams]
    blocks = residual_blocks(analysis)
    if not blocks:
        ends = divided(analysis, [*batch_norm_ends(steps), *between_streams], blocks)
        after = _cuts(steps, ends).after or _last_cut(steps)
        notes = () if between_streams else (NO_RESIDUAL_BLOCK,)
        return Cuts(after, notes)
    ends = sorted({*residual_ends(steps, blocks), *between_streams})
    # A row of steps with streams begins like a residual block: what lies before it is a block.
    rows_of_streams = [i for i in between_streams if i - 1 not in between_streams]
    for start in sorted({*blocks, *rows_of_streams}):
        cut_between(steps, ends, start)
    last = settled(steps, max(blocks.values()))
    ends.append(tail_end(steps, last))
    after = _cuts(steps, divided(analysis, ends, blocks)).after
    return Cuts(after, _why_one_block(analysis) if len(after) == 1 else ())


def _last_cut(steps: Steps) -> tuple[Cut, ...]:
    """Return the last cut with something to learn before it, where there is one.

    Layers may be no groups: they hold vectors alone, or lie behind the first flat value.
    """
    places = legal(steps, range(len(steps)))
    if not places:
        return ()
    last = places[-1]
    learns = any(step.trainable for step in steps[: last + 1])
    return (steps[last].cut,) if learns else ()


def _why_one_block(analysis: Analysis) -> tuple[str, ...]:
    """Return a note for a plan with one feature block."""
    others = len(analysis.candidates) - 1
    if not others:
        return ("the model has one feature block, since a cut can lie at one place alone",)
    return (
        "the model has one feature block, since all its residual blocks lie in it or it is the "
        f"only one; policy='layer' or a list of nodes may cut at {others} more",
    )


def batchnorm(analysis: Analysis, options: Options) -> Cuts:
    """Cut into BN groups: a layer with its BN, activation and pool.

    A layer without BN is a group as well, while the value has not been flattened.
    """
    ends = batch_norm_ends(analysis.steps)
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
    depth = positive_integer("depth", depth)

    def cut(analysis: Analysis, options: Options) -> Cuts:
        steps = analysis.steps
        runs = [run for run in _runs(steps, depth) if has_weight(steps, run.start, run.stop)]
        # No block ends with the last run, which is the classifier's.
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
    n = positive_integer("n", n)

    def cut(analysis: Analysis, options: Options) -> Cuts:
        ends = group_ends(analysis)
        if not ends:
            return Cuts(())  # the error of a model without a place to cut says why
        if n > len(ends):
            raise CutError(
                f"stages({n}) asks for more feature blocks than the {len(ends)} BN groups of the "
                f"model. Hint: n <= {len(ends)}"
            )
        macs_of_steps = [analysis.macs(step) for step in analysis.steps]
        macs_until = np.cumsum(macs_of_steps, dtype=float)
        # Place 0 is the start of the model, so place i is the end of group i - 1.
        cost = [0.0, *macs_until[ends]]
        chosen = _balanced(cost, n)
        return _cuts(analysis.steps, [ends[i - 1] for i in chosen])

    return named(cut, f"stages({n})")


def named(policy: Policy, name: str) -> Policy:
    """Return a policy after giving it the name that a plan will print."""
    policy.__name__ = name
    return policy


def _takes_options(policy: Callable[..., Any]) -> bool:
    """Return whether a policy is called with the options besides the analysis.

    It is if it has two parameters without a default, or if its second one is called `options`.
    """
    try:
        signature = inspect.signature(policy)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False
    positional = []
    required = []
    takes_any_number = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:  # *args
            takes_any_number = True
            continue
        if parameter.kind is parameter.VAR_KEYWORD:  # **kwargs
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(parameter.name)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    only_by_keyword = set(required).difference(positional)
    takes_none = not positional and not takes_any_number
    if len(required) > 2 or only_by_keyword or takes_none:
        raise InputError(
            f"the policy takes {signature}. Hint: a policy takes (analysis) or (analysis, options)"
        )
    return len(required) == 2 or positional[1:2] == ["options"]


def _checked(chosen: Any) -> tuple[Any, ...]:
    """Return the cuts that a policy chose as a tuple. A single name is refused, not spelt out.

    Raises:
        InputError: they are no iterable of cuts.
    """
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise InputError(
            f"the policy returned a {type(chosen).__name__}. "
            "Hint: return the names of the nodes to cut after, as a list"
        )
    return tuple(chosen)


def _notes(notes: Any) -> tuple[str, ...]:
    """Return the notes of a policy. One sentence may stand by itself, and None for no note.

    Raises:
        InputError: they are no sentences.
    """
    if notes is None or isinstance(notes, str):
        return () if notes is None else (notes,)
    given = tuple(notes) if isinstance(notes, Iterable) else (notes,)
    for note in given:
        if not isinstance(note, str):
            raise InputError(
                f"a note of the policy is {note!r}, of type {type(note).__name__}. "
                "Hint: notes are sentences for the plan, Cuts(after, ('why it is cut there',))"
            )
    return given


def _cut(names: Any) -> Cut:
    """Return a cut as a name or a tuple of names. It may be a list of a checkpoint, or a set.

    Raises:
        InputError: it is something else.
    """
    if isinstance(names, str):
        return names
    if not isinstance(names, (tuple, list, set, frozenset)):
        raise _no_cut(names)
    if not names or not all(isinstance(name, str) for name in names):
        raise _no_cut(names)
    return tuple(names)


def _no_cut(names: Any) -> InputError:
    return InputError(
        f"{shown(names)} is no place of a cut. Hint: a policy is a name such as 'layer', a "
        "function, or the names of the nodes to cut after, a tuple of names where several values "
        "cross"
    )


def _cuts(steps: Steps, ends: Iterable[int]) -> Cuts:
    """Return the cuts after those of the steps that a cut may follow."""
    cuts = [steps[i].cut for i in legal(steps, ends)]
    return Cuts(tuple(cuts))


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
    end = group_end(steps, last_weighted, stop)
    return settled(steps, end) if steps[end].refusal else end


def _balanced(cost: list[float], parts: int) -> list[int]:
    """Divide the places 0 .. len(cost) - 1 into parts and return the place where each ends.

    The sum of the squares of the parts' costs is the least possible. It is found by dynamic
    programming. After k rounds, `best[i]` is the least sum for k parts that reach from 0 to i, and
    `sources[k - 1][i]` is where the last of these parts starts.

    Args:
        cost: of everything up to each place, rising.
        parts: how many.
    """
    places = len(cost)
    reached = np.asarray(cost) / max(cost[-1], 1.0)  # 1.0 where nothing is multiplied
    part_costs = reached[None, :] - reached[:, None]  # of a part from row to column
    squares = part_costs**2
    # A part goes forward, by one place at least. All others are ruled out.
    squares[np.tri(places, dtype=bool)] = np.inf
    best = np.full(places, np.inf)
    best[0] = 0.0
    sources = []
    for _ in range(parts):
        total = best[:, None] + squares
        sources.append(total.argmin(0))
        best = total.min(0)
    # The last part ends in the last place. Where it starts, the part before it ends. The first
    # part starts at 0, so its source tells nothing.
    ends = [places - 1]
    for source in reversed(sources[1:]):
        ends.append(int(source[ends[-1]]))
    return ends[::-1]
