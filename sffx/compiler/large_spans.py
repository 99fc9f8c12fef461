"""Spans that hold much of a model are cut further.

1. A span in which no residual block lies is cut after each layer, if it holds most of the
   parameters, or several layers with more than a third. Such a span is the stack of linear layers
   behind a flatten (VGG), or a stem of plain convolutions.
2. A span with more than a third is cut where single values cross inside, until each part holds
   less. This is done only if the span holds several residual blocks, or layers on both sides of a
   concatenation. A CSP stage has layers before and behind its parallel paths. Behind a dense block
   comes its transition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

from sffx.compiler.analyse import Analysis
from sffx.compiler.spans import Steps, has_weight, layer_ends, legal

LARGE_BLOCK = 1 / 3  # share of the parameters


def divided(analysis: Analysis, ends: Iterable[int], blocks: Mapping[int, int]) -> list[int]:
    """Return the cuts, and further ones inside the spans that hold much of the model.

    Args:
        analysis: of the model.
        ends: the cuts so far, as steps.
        blocks: the residual blocks, {index of the first step: index of the last step}. A span in
            which one of them lies, or a part of one, is left as it is.
    """
    steps = analysis.steps
    kept = legal(steps, ends)
    sizes = _numbers_of_parameters(analysis)
    # The last layer is the classifier's. It is in no span, however large it is.
    last_layer = max((i for i, step in enumerate(steps) if step.weighted), default=-1)
    places = layer_ends(analysis)
    # 1. Also in the span behind the last cut, where the linear layers of VGG lie.
    between_layers = []
    for before, end in pairwise([-1, *kept, len(steps) - 1]):
        span = range(before + 1, min(end + 1, last_layer))
        has_block = _holds_part_of_block(blocks, before, end)
        if _is_large(steps, sizes, span) and not has_block:
            between_layers += _between_layers(analysis, places, before, end)
    # 2. In the spans that are left now.
    ends_so_far = sorted({*kept, *between_layers})
    inside = []
    for before, end in pairwise([-1, *ends_so_far]):
        span = range(before + 1, end + 1)
        has_several_blocks = len(_residual_modules(analysis, span)) > 1
        if has_several_blocks or _goes_on_behind_concatenation(steps, span):
            inside += _most_even(analysis, sizes, places, before, end)
    return sorted({*ends_so_far, *inside})


def _holds_part_of_block(blocks: Mapping[int, int], before: int, end: int) -> bool:
    """Return whether a residual block lies between two cuts, or a part of one."""
    return any(start <= end and last > before for start, last in blocks.items())


def _between_layers(analysis: Analysis, places: Iterable[int], before: int, end: int) -> list[int]:
    """Return the places between two cuts that part the layers there from each other."""
    steps = analysis.steps
    found = []
    for place in places:
        if not before < place < end:
            continue
        # A cut behind the only layer would leave a block of positions or of a norm.
        is_behind_layer = has_weight(steps, before + 1, place + 1)
        is_before_layer = has_weight(steps, place + 1, end + 1)
        # What is added to an embedding, such as positions, belongs to it.
        only_embeds = _only_embeds(analysis, before + 1, place + 1)
        if is_behind_layer and is_before_layer and not only_embeds:
            found.append(place)
    return found


def _is_large(steps: Steps, sizes: list[int], span: range) -> bool:
    """Return whether a span has most of the parameters, or several layers with a third."""
    share = sum(sizes[i] for i in span) / max(sum(sizes), 1)
    num_layers = sum(steps[i].weighted for i in span)
    limit = LARGE_BLOCK if num_layers > 1 else 1 / 2
    return share > limit


def _residual_modules(analysis: Analysis, span: range) -> set[str]:
    """Return the qualnames of the modules with a sum of paths in the steps of a span."""
    owners: set[str] = set()
    for i in span:
        owners |= analysis.modules_with_sum(analysis.steps[i].nodes)
    return owners


def _goes_on_behind_concatenation(steps: Steps, span: range) -> bool:
    """Return whether a span has layers up to a concatenation of paths, and others behind it."""
    for i in span:
        if steps[i].join == "cat" and has_weight(steps, i + 1, span.stop):
            return has_weight(steps, span.start, i + 1)
    return False


def _most_even(
    analysis: Analysis, sizes: list[int], places: list[int], before: int, end: int
) -> list[int]:
    """Return cuts between steps until each part has a third of the parameters or less.

    Each cut makes the larger of its two parts as small as it can be.

    Args:
        analysis: of the model.
        sizes: the number of parameters of each step.
        places: the steps that a cut may follow.
        before: the step before the first one.
        end: the last step.
    """
    size = sum(sizes[before + 1 : end + 1])
    if size <= LARGE_BLOCK * sum(sizes):
        return []
    best = None
    smallest = math.inf
    for place in places:
        if not before < place < end:
            continue
        only_embeds = _only_embeds(analysis, before + 1, place + 1)
        if only_embeds or not has_weight(analysis.steps, place + 1, end + 1):
            continue
        left = sum(sizes[before + 1 : place + 1])
        right = sum(sizes[place + 1 : end + 1])
        larger = max(left, right)
        if larger < smallest:
            best = place
            smallest = larger
    if best is None:
        return []
    cuts_before = _most_even(analysis, sizes, places, before, best)
    cuts_behind = _most_even(analysis, sizes, places, best, end)
    return [*cuts_before, best, *cuts_behind]


def _only_embeds(analysis: Analysis, start: int, stop: int) -> bool:
    """Return whether the only layers in the steps of [start, stop) are embeddings."""
    for step in analysis.steps[start:stop]:
        for name in step.nodes:
            node = analysis.nodes[name]
            has_parameters = bool(analysis.parameters(node))
            if has_parameters and not isinstance(analysis.module(node), nn.Embedding):
                return False
    return True


def _numbers_of_parameters(analysis: Analysis) -> list[int]:
    """Return the number of scalars in the parameters of each step.

    A shared parameter counts once, where it is used first.
    """
    seen: set[int] = set()
    numbers = []
    for step in analysis.steps:
        number = 0
        for name in step.nodes:
            for parameter in analysis.parameters(analysis.nodes[name]).values():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    number += parameter.numel()
        numbers.append(number)
    return numbers
