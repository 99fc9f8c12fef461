"""The heads of a block that several streams leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block
from sffx.tasks.grid import on_grid
from sffx.tasks.over_space import INTERPOLATION


class StreamHeads(nn.ModuleList):
    """The heads of a block that several streams leave. Its goodness is the mean of theirs.

    So each stream learns, and the block answers with what all of them know. A mean, and not a sum,
    keeps the scores as large as those of other blocks, with which the ensemble takes their mean.
    Scores of pixels are brought to the size of the largest stream before that.

    Args:
        heads: one for each stream.
        masked: for each stream, whether its head takes a mask.
    """

    def __init__(self, heads: Sequence[nn.Module], masked: Sequence[bool]) -> None:
        super().__init__(heads)
        self.masked = tuple(masked)

    def forward(self, *arguments: Tensor) -> Tensor:
        """Return the goodness, (B, J), or the scores of another task.

        Args:
            arguments: the value of each stream, each followed by its mask if it has one.
        """
        ahead = list(arguments)
        scores = []
        for head, is_masked in zip(self, self.masked, strict=True):
            own = [ahead.pop(0)]
            if is_masked:
                own.append(ahead.pop(0))
            scores.append(head(*own))
        if any(each.shape != scores[0].shape for each in scores):
            scores = _of_one_size(scores)
        return torch.stack(scores).mean(0)


def _of_one_size(values: list[Tensor]) -> list[Tensor]:
    """Return values of positions, (B, C, ...), all of the size of the largest map.

    Values of the tokens of a grid, (B, C, N), become maps where others are.
    """
    axes = max(each.ndim for each in values) - 2
    largest = max((each for each in values if each.ndim == axes + 2), key=_positions)
    size = largest.shape[2:]
    brought = []
    for each in values:
        if axes == 2:
            each = on_grid(each, size)
        if each.shape[2:] != size:
            each = F.interpolate(each, size, mode=INTERPOLATION[axes], align_corners=False)
        brought.append(each)
    return brought


def _positions(value: Tensor) -> int:
    return value.shape[2:].numel()


class SideBySide(nn.Module):
    """One head for streams that share their layers, such as the two images of a Siamese net.

    It reads the channels of all streams, so it can compare them. A head for each stream would learn
    nothing: one image alone does not tell whether both show the same. A stream with fewer positions
    is brought to the size of the largest.

    Args:
        head: for a value with the channels of all streams.
        channel_axis: of the streams.
    """

    def __init__(self, head: nn.Module, channel_axis: int) -> None:
        super().__init__()
        self.head = head
        self.channel_axis = channel_axis

    def forward(self, *streams: Tensor) -> Tensor:
        """Return the goodness, (B, J), or the scores of another task.

        Args:
            streams: the value of each stream.
        """
        values = [stream.movedim(self.channel_axis, 1) for stream in streams]
        if any(each.shape[2:] != values[0].shape[2:] for each in values):
            values = _of_one_size(values)
        joined = torch.cat(values, 1).movedim(1, self.channel_axis)
        scores: Tensor = self.head(joined)
        return scores


def share_layers(block: Block) -> bool:
    """Return whether all streams that leave a block run through the same layers, in one layout."""
    layouts = set()
    layers = set()
    for output in block.scored:
        if output.mask or output.is_folded:
            return False
        channels = output.shape[output.channel_axis - 1]
        layouts.add((len(output.shape), output.channel_axis, channels))
        layers.add(_layers_before(block, output.name))
    return len(layouts) == len(layers) == 1


def side_by_side(block: Block) -> Block:
    """Return a block whose output has the channels of all streams that leave it."""
    shape = list(block.shape)
    shape[block.channel_axis - 1] *= len(block.scored)
    return replace(block, shape=tuple(shape))


def _layers_before(block: Block, name: str) -> frozenset[str]:
    """Return the modules and attributes of a block that lead to one of its values."""
    nodes = {node.name: node for node in block.graph}
    layers = set()
    passed: set[str] = set()
    ahead = [name]
    while ahead:
        name = ahead.pop()
        if name in nodes and name not in passed:
            passed.add(name)
            node = nodes[name]
            if node.is_module or not node.reads:
                layers.add(node.call)
            ahead += node.reads
    return frozenset(layers)
