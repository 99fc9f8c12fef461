"""Tensors that a forward makes of sizes alone, such as a causal mask.

They have values in a trace, on the sizes of the example. So a branch on such a value, and a number
that is read from it, can be settled as one on the sizes themselves.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sffx.compiler.facts import facts, storages_written
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.randomness import call_without_draws
from sffx.tensors import holds_tensor, storage_key


def value_of_sizes(
    node: fx.Node, probe: nn.Module, constants: Collection[str]
) -> tuple[Tensor, list[fx.Node]] | None:
    """Return the value of a tensor on the sizes of the example, and the nodes of these sizes.

    Args:
        node: of the tensor.
        probe: holds the constants.
        constants: names of the tensors that the forward has made.

    Returns:
        None where the value depends on anything else: on data, weights, the batch size, random
        numbers, or on writes in place.
    """
    maker = _Maker(probe, constants, storages_written(node.graph.nodes))
    try:
        with unset_fake_temporarily():
            value = call_without_draws(lambda: maker.value(node))
    except Exception:
        return None
    return value, list(maker.sizes)


class _Maker:
    """Computes values that are made of sizes.

    Attributes:
        sizes: the nodes of the sizes and other plain values, in order.
    """

    def __init__(self, probe: nn.Module, constants: Collection[str], written: set[int]) -> None:
        self.sizes: dict[fx.Node, None] = {}
        self._probe = probe
        self._constants = constants
        self._written = written
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node.

        Raises:
            LookupError: it is made of something else.
        """
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        """Return the value of a node, from those of the nodes that it reads."""
        example = facts(node).example
        if not holds_tensor(example):
            return self._size(node, example)
        if isinstance(example, Tensor) and storage_key(example) in self._written:
            raise LookupError("it is written in place")
        if node.op == "get_attr" and node.target in self._constants:
            return attribute(self._probe, str(node.target))
        args: Any = fx.node.map_arg(node.args, self.value)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.value)
        target: Any = node.target
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        raise LookupError("it is an input, or what the model holds or computes")

    def _size(self, node: fx.Node, example: Any) -> Any:
        if facts(node).of_batch or isinstance(example, (tuple, list)):
            raise LookupError("it depends on the batch, or holds several sizes")
        self.sizes[node] = None
        return example
