"""Which maps the tokens of a value are the pixels of.

A vision transformer flattens a map into tokens, or makes a map of its tokens. The learned queries
of a decoder may be as many, but each looks at the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from torch import Tensor, nn
from torch.fx import Node

from sffx.compiler.batch_axis import is_reshape, starts_with_batch
from sffx.compiler.dataflow import Dataflow
from sffx.compiler.facts import facts
from sffx.compiler.qualnames import name_of_target
from sffx.tensors import holds_tensor

# The size of a map along its axes of space.
Size = tuple[int, ...]

# Of a map: batch, channels, height and width. The tokens of volumes are not scored.
_AXES = 4

# What attention calls. The tokens of the result are those of the first argument, the query.
_OF_FIRST = (
    "baddbmm",
    "bmm",
    "einsum",
    "matmul",
    "scaled_dot_product_attention",
)


class Grids:
    """The maps that the tokens of a model's values come from, or become.

    Args:
        flow: the dataflow of the model.
        root: the model that its nodes call modules of.
        channel_axes: the channel axis of each value that has one.
    """

    def __init__(self, flow: Dataflow, root: nn.Module, channel_axes: Mapping[str, int]) -> None:
        self._nodes = list(flow.nodes.values())
        self._root = root
        self._channel_axes = channel_axes

    def of(self, name: str) -> set[Size]:
        """Return the sizes of the maps that the tokens of a value come from, or become."""
        return self._before[name] | self._after[name]

    @cached_property
    def _before(self) -> dict[str, set[Size]]:
        """The maps that the tokens of each value come from."""
        before: dict[str, set[Size]] = {}
        for node in self._nodes:
            before[node.name] = self._own_size(node)
            if self._is_of_sample(node):
                continue
            for source in _token_sources(node):
                before[node.name] |= before[source.name]
        return before

    @cached_property
    def _after(self) -> dict[str, set[Size]]:
        """The maps that the tokens of each value become."""
        after: dict[str, set[Size]] = {node.name: set() for node in self._nodes}
        for node in reversed(self._nodes):
            own = self._own_size(node)
            if own and not is_reshape(node, self._root):
                continue  # it is computed of tokens, and not made of them
            for source in _token_sources(node):
                after[source.name] |= own | after[node.name]
        return after

    def _is_of_sample(self, node: Node) -> bool:
        """Whether a value has one position, as a mean over space, whose map is forgotten."""
        value = facts(node).example
        is_row = isinstance(value, Tensor) and value.ndim <= 2
        if is_row and starts_with_batch(facts(node).batch):
            return True
        return self._own_size(node) == {(1, 1)}

    def _own_size(self, node: Node) -> set[Size]:
        """Return the size of a map along its axes of space; none of another value."""
        value = facts(node).example
        axis = self._channel_axes.get(node.name)
        if axis is None or not isinstance(value, Tensor) or value.ndim != _AXES:
            return set()
        return {tuple(value.shape[1:axis] + value.shape[axis + 1 :])}


def _token_sources(node: Node) -> Iterator[Node]:
    """Yield the tensors that a node reads and that may have the tokens of its value."""
    is_of_first = node.op == "call_module" or name_of_target(node.target) in _OF_FIRST
    for read in node.all_input_nodes:
        if holds_tensor(facts(read).example):
            yield read
            if is_of_first:
                return
