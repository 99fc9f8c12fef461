"""Where blocks begin and end on the spine of a model.

A place in the model is the index of a step, and a cut is made after a step. A span of steps is a
block. All policies share three rules:

- An activation after a block belongs to the block: it has no layer of its own and keeps the shape,
  or has fewer channels. So does a BN layer. Another norm right behind a layer does as well, and
  so does what else keeps the shape and has vectors alone, as a norm that was written by hand.
- A gate (squeeze-and-excitation, a product of paths) belongs to the layer that it gates.
- The last layer with a weight is the classifier's, with the pool, the flatten and the dropout
  before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from sffx.compiler.analyse import Analysis
from sffx.compiler.steps import Step

Steps = tuple[Step, ...]


def group_ends(analysis: Analysis) -> list[int]:
    """Return the steps that end a BN group; those that end a layer where there is no group."""
    groups = legal(analysis.steps, batch_norm_ends(analysis.steps))
    return groups or layer_ends(analysis)


def layer_ends(analysis: Analysis) -> list[int]:
    """Return the steps that end a layer with its BN and its activation, but the classifier's."""
    steps = analysis.steps
    ends = []
    for start in _layer_starts(steps)[:-1]:
        ends.append(settled(steps, start))
    return legal(steps, ends)


def legal(steps: Steps, ends: Iterable[int]) -> list[int]:
    """Return those of the steps that a cut may follow, in order, each once."""
    places = []
    for i in sorted(set(ends)):
        # -1 stands for the start of the model.
        if i >= 0 and not steps[i].refusal:
            places.append(i)
    return places


def has_weight(steps: Steps, start: int, stop: int) -> bool:
    """Return whether one of the steps in [start, stop) has a weight."""
    return any(step.weighted for step in steps[start:stop])


def _first_pool(steps: Steps, start: int, stop: int) -> int:
    """Return the step in [start, stop) that starts the way to the classifier; `stop` if none."""
    for i in range(start, stop):
        if steps[i].pools:
            return i
    return stop


def settled(steps: Steps, end: int) -> int:
    """Return a cut moved behind the steps that belong to the block before it.

    Behind a convolution it moves over the BN layer and the ReLU.
    """
    end = _behind_followers(steps, end)
    narrowed = _narrowed(steps, end)
    return _behind_followers(steps, narrowed) if narrowed > end else end


def _behind_followers(steps: Steps, end: int) -> int:
    """Return the last of the steps behind `end` that follow one another in its block.

    It is `end` if none does.
    """
    is_direct = _is_direct(steps[end])
    while end + 1 < len(steps):
        # A norm of several steps comes first. It may begin with a permutation of equal sizes, which
        # keeps the shape, and so would follow without the rest of the norm.
        last = _end_of_norm(steps, end) if is_direct else end
        if last > end:
            end = last  # `is_direct` stays: another norm behind it is still that of the layer
            continue
        if not _follows(steps[end + 1], steps[end], is_direct=is_direct):
            break
        end += 1
        is_direct = _is_direct(steps[end])
    return end


def _end_of_norm(steps: Steps, end: int) -> int:
    """Return the last step of a norm behind a step, whose module takes several steps; else `end`.

    A norm over the channels of an image turns the axes, norms, and turns them back.
    """
    scope = steps[end + 1].scope
    if not scope or _is_inside(steps[end], scope):
        return end
    last = end
    while last + 1 < len(steps) and _is_inside(steps[last + 1], scope):
        last += 1
    steps_inside = steps[end + 1 : last + 1]
    has_vectors = any(step.norm or step.scales for step in steps_inside)
    has_matrix = any(step.weighted for step in steps_inside)
    keeps_shape = steps[last].shape == steps[end].shape
    is_norm = has_vectors and not has_matrix and keeps_shape
    return last if is_norm else end


def _is_inside(step: Step, scope: str) -> bool:
    """Return whether a step lies in a module, or in one of its children."""
    return f"{step.scope}.".startswith(f"{scope}.")


def _narrowed(steps: Steps, end: int) -> int:
    """Return the step behind `end` at which an activation has fewer channels, `end` if none has.

    Maxout takes several steps: it unflattens the channels, and then takes the largest ones.
    """
    for following in range(end + 1, len(steps)):
        step = steps[following]
        if step.trainable or step.pools or step.drops:
            break
        if step.narrows and not step.refusal:
            return following
    return end


def _follows(step: Step, before: Step, *, is_direct: bool) -> bool:
    """Return whether a step belongs to the block that the step before it is in.

    Args:
        step: behind the other one.
        before: which ends with a layer, or with what belongs to it.
        is_direct: whether a norm in `step` is that of the layer.
    """
    is_gate = step.join == "product" and step.shape == before.shape
    is_norm_of_layer = is_direct and (step.norm or step.scales)
    is_its_norm = (step.batchnorm or is_norm_of_layer) and not step.weighted
    # No cut can part the two, and the step has nothing that a block of its own could learn.
    cannot_part = bool(before.refusal) and not step.trainable
    return step.keeps_shape or is_gate or is_its_norm or cannot_part


def _is_direct(before: Step) -> bool:
    """Return whether a norm behind a step is that of the layer in the step, or of its norm.

    Behind a sum, another norm than BN begins the next block, as in a transformer.
    """
    return not before.join and (before.weighted or before.norm or before.scales)


def legal_before(steps: Steps, end: int, floor: int) -> int:
    """Return the last step in (floor, end] that a cut may follow; `end` if none may."""
    for i in range(end, floor, -1):
        if not steps[i].refusal:
            return i
    return end


def legal_behind(steps: Steps, end: int) -> int | None:
    """Return the first step after `end` that a cut may follow."""
    for i in range(end + 1, len(steps)):
        if not steps[i].refusal:
            return i
    return None


def _layer_starts(steps: Steps) -> list[int]:
    """Return the steps that begin a layer. A gate is none, since it belongs to another layer."""
    starts = []
    for i, step in enumerate(steps):
        is_gate = step.join == "product"
        if step.weighted and not is_gate:
            starts.append(i)
    return starts


def batch_norm_ends(steps: Steps) -> list[int]:
    """Return the last step of each BN group, but for the last group, which is the classifier's.

    A group begins with a layer. Where the value is flat, only layers with BN are groups.
    """
    flat = _first_pool(steps, 0, len(steps))
    ends = []
    for start, following in pairwise(_layer_starts(steps)):
        has_batch_norm = any(step.batchnorm for step in steps[start:following])
        if start < flat or has_batch_norm:
            ends.append(group_end(steps, start, following))
    return ends


def group_end(steps: Steps, start: int, following: int) -> int:
    """Return the last step of a group, which ends before the way to the classifier begins.

    It also ends before a step without parameters that enlarges what crosses the cut, such as the
    upsampling and the concatenation in front of a decoder stage of a U-Net. Behind it the norm and
    the head would read more numbers, which say nothing more of the group.

    Args:
        steps: of the model.
        start: the first step of the group.
        following: the first step of the group after it.
    """
    stop = _first_pool(steps, start + 1, following)
    # Dropout right before that way is the classifier's as well.
    while stop > start + 1 and _is_classifier_dropout(steps, stop - 1):
        stop -= 1
    for i in range(start + 1, stop):
        is_larger = steps[i].crossing > steps[i - 1].crossing
        if is_larger and not steps[i].trainable and not steps[i - 1].refusal:
            return i - 1
    return legal_before(steps, stop - 1, start - 1)


def _is_classifier_dropout(steps: Steps, index: int) -> bool:
    """Return whether a step is dropout with no weight after it but the classifier's."""
    last = len(steps) - 1
    return steps[index].drops and not has_weight(steps, index + 1, last)
