"""Which input marks the real tokens of a value.

An attention mask (B, T) marks the tokens of a value (B, T, C). Where two sequences of a model have
the same length, as in an encoder and a decoder, lengths do not tell whose tokens they are. Then the
dataflow does.
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
        # They come first among the nodes.
        placeholders = takewhile(lambda node: node.op == "placeholder", flow.nodes.values())
        self._inputs: dict[Node, Input] = {}
        for node, read in zip(placeholders, inputs, strict=True):
            self._inputs[node] = read
        self.nodes = [node for node, read in self._inputs.items() if read.marks_tokens]
        self._behind: dict[str, set[str]] = {}

    def of(self, name: str) -> str:
        """Return the name of the mask of a value, "" where there is none.

        There is none where the value has no tokens, or other tokens than the inputs with a mask.
        """
        record = facts(self._flow.nodes[name])
        shape = record.example.shape
        # How the classes of the logits lie, the task says.
        has_tokens = name == self._flow.logits or self._channel_axes.get(name) == 2
        if len(shape) != 3 or not has_tokens or record.is_folded:
            return ""
        of_length = [node for node in self.nodes if facts(node).example.shape == shape[:2]]
        sequences = self._sequences(shape[1])
        leading = [each for each in sequences if name in self._paths_behind(each)]
        for mask in of_length:
            if not leading or self._latest(leading) in self._owners(mask, sequences):
                return mask.name
        return ""

    def _sequences(self, length: int) -> list[str]:
        """Return the inputs, other than masks, with so many tokens."""
        sequences = []
        for node, read in self._inputs.items():
            if not read.marks_tokens and read.shape[:1] == (length,):
                sequences.append(node.name)
        return sequences

    def _latest(self, sequences: list[str]) -> str:
        """Return the sequence that joins the others: the least of the model comes after it.

        A decoder reads its own tokens and those of the encoder.
        """
        return min(sequences, key=lambda each: len(self._paths_behind(each)))

    def _owners(self, mask: Node, sequences: list[str]) -> list[str]:
        """Return the sequences with most of what a mask leads to: those whose tokens it marks.

        They are several where the tokens themselves, their types and their positions are inputs.
        """
        marked = self._paths_behind(mask.name)
        shares = [len(marked & self._paths_behind(each)) for each in sequences]
        pairs = zip(sequences, shares, strict=True)
        return [each for each, share in pairs if share == max(shares)]

    def _paths_behind(self, name: str) -> set[str]:
        """Return the values on paths that the value of an input leads to."""
        if name not in self._behind:
            behind = nx.descendants(self._flow.graph, name)
            self._behind[name] = {each for each in behind if self._flow.is_path(each)}
        return self._behind[name]
