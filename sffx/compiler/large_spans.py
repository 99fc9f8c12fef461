"""Spans that hold most of a model although no residual block lies in them: cut after each layer.

Such a span is the stack of linear layers behind a flatten (VGG), or a stem of plain convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

from sffx.compiler.analyse import Analysis
from sffx.compiler.spans import has_weight, layer_ends, legal


def divided(analysis: Analysis, ends: Iterable[int], blocks: Mapping[int, int]) -> list[int]:
    """Return the cuts, and those after each layer of a span with most of the parameters.

    Args:
        analysis: of the model.
        ends: the cuts so far, as steps.
        blocks: the residual blocks, {index of the first step: index of the last step}. A span in
            which one of them lies, or a part of one, is left as it is.
    """
    steps = analysis.steps
    kept = legal(steps, ends)
    sizes = _numbers_of_parameters(analysis)
    classifier = max((i for i, step in enumerate(steps) if step.weighted), default=-1)
    added = []
    for before, end in pairwise([-1, *kept, len(steps) - 1]):
        # The last layer stays with the classifier, however large it is.
        is_large = 2 * sum(sizes[before + 1 : min(end + 1, classifier)]) > sum(sizes)
        has_block = any(start <= end and last > before for start, last in blocks.items())
        if not is_large or has_block:
            continue
        for place in layer_ends(analysis):
            is_inside = before < place < end
            # What is added to an embedding, such as positions, belongs to it.
            only_embeds = _only_embeds(analysis, before + 1, place + 1)
            # A cut behind the only layer would leave a block of positions or of a norm.
            parts_layers = has_weight(steps, before + 1, place + 1) and has_weight(
                steps, place + 1, end + 1
            )
            if is_inside and parts_layers and not only_embeds:
                added.append(place)
    return sorted({*kept, *added})


def _only_embeds(analysis: Analysis, start: int, stop: int) -> bool:
    """Return whether the only layers in the steps of [start, stop) are embeddings."""
    for step in analysis.steps[start:stop]:
        for name in step.nodes:
            node = analysis.nodes[name]
            if not analysis.parameters(node):
                continue
            is_call = node.op == "call_module"
            if not is_call or not issubclass(analysis.kind(str(node.target)), nn.Embedding):
                return False
    return True


def _numbers_of_parameters(analysis: Analysis) -> list[int]:
    """Return the number of scalars in the parameters of each step; one that is shared counts once.

    It counts where it is used first.
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
