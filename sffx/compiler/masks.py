"""Which input marks the real tokens of a value.

An attention mask (B, T) marks the tokens of a value (B, T, C). A model may read two sequences of
the same length, as an encoder and a decoder do. Then the length does not tell whose tokens a mask
marks, but the dataflow does: a mask belongs to the sequence with which it shares most of the values
that the two lead to. A value belongs to the latest sequence that leads to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import networkx as nx
from torch.fx import Node

from sffx.blocks import Input
from sffx.compiler.dataflow import Dataflow
from sffx.compiler.facts import facts


class Masks:
    """The attention masks of a model.

    Args:
        flow: the dataflow of the model.
        inputs: of the model.
        channel_axes: the channel axis of each value that has one.

    Attributes:
        nodes: of the inputs that are masks.
    """

    def __init__(
        self, flow: Dataflow, inputs: Sequence[Input], channel_axes: Mapping[str, int]
    ) -> None:
        self._flow = flow
        self._channel_axes = channel_axes
        # The placeholders come first among the nodes, in the order of the inputs.
        placeholders = takewhile(lambda node: node.op == "placeholder", flow.nodes.values())
        self._inputs: dict[Node, Input] = {}
        for node, read in zip(placeholders, inputs, strict=True):
            self._inputs[node] = read
        self.nodes = [node for node, read in self._inputs.items() if read.marks_tokens]
        self._behind: dict[str, set[str]] = {}  # by the name of an input; see `_paths_behind`

    def of(self, name: str) -> str:
        """Return the name of the mask of a value, "" where there is none.

        There is none where the value has no tokens, or other tokens than the inputs with a mask.
        """
        record = facts(self._flow.nodes[name])
        shape = record.example.shape
        # The task says which axis of the logits has the classes, so they may lie before the tokens.
        has_tokens = name == self._flow.logits or self._channel_axes.get(name) == 2
        if len(shape) != 3 or not has_tokens or record.is_folded:
            return ""
        masks = [node for node in self.nodes if facts(node).example.shape == shape[:2]]
        sequences = self._sequences(shape[1])
        leading = [each for each in sequences if name in self._paths_behind(each)]
        if not leading:  # the length is all that is known
            return masks[0].name if masks else ""
        latest = self._latest(leading)
        for mask in masks:
            if latest in self._owners(mask, sequences):
                return mask.name
        return ""

    def _sequences(self, length: int) -> list[str]:
        """Return the names of the inputs, other than masks, with so many tokens."""
        sequences = []
        for node, read in self._inputs.items():
            if not read.marks_tokens and read.shape[:1] == (length,):
                sequences.append(node.name)
        return sequences

    def _latest(self, sequences: list[str]) -> str:
        """Return the sequence that joins the others last: the fewest values come after it.

        It is that of a decoder, since the values of the encoder come after the encoder's tokens
        alone, and those of the decoder after both.
        """
        return min(sequences, key=lambda each: len(self._paths_behind(each)))

    def _owners(self, mask: Node, sequences: list[str]) -> list[str]:
        """Return the sequences whose tokens a mask marks: they share most values with it.

        They are several where the tokens themselves, their types and their positions are inputs.
        """
        masked = self._paths_behind(mask.name)
        num_shared = {each: len(masked & self._paths_behind(each)) for each in sequences}
        most = max(num_shared.values())
        return [each for each in sequences if num_shared[each] == most]

    def _paths_behind(self, name: str) -> set[str]:
        """Return the values on paths that the value of an input leads to."""
        if name not in self._behind:
            behind = nx.descendants(self._flow.graph, name)
            self._behind[name] = {each for each in behind if self._flow.is_path(each)}
        return self._behind[name]
