"""Writes on a model's tensors that no node of a graph does.

`for p in self.teacher.parameters(): p.data.mul_(0.9)` is the case. fx gives proxies for attributes
that a forward reads, and not for what it finds in `parameters()`.
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from sffx.compiler.facts import storages_written
from sffx.tensors import storage_key

# By the name of a parameter or a buffer: the tensor, and how often it was written.
Versions = dict[str, tuple[Tensor, int]]


def versions(module: nn.Module) -> Versions:
    """Return how often each tensor of a module was written, as torch counts it."""
    found: Versions = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # Others are tables that the forward makes, or flags.
        if isinstance(tensor, FakeTensor):
            found[name] = (tensor, tensor._version)
    return found


class Writes:
    """The writes of one trace."""

    def __init__(self) -> None:
        self._seen: set[int] = set()  # keys of storages

    def note(self, node: fx.Node) -> None:
        """Note what a node writes."""
        self._seen |= storages_written([node])

    def note_leaf(self, before: Versions) -> None:
        """Note what a leaf has written, of which these were the tensors before."""
        for tensor, version in before.values():
            if tensor._version != version:
                self._seen.add(storage_key(tensor))

    def require_seen(self, before: Versions) -> None:
        """Raise a RuntimeError if a forward has written by no node of the graph.

        Args:
            before: the tensors of its module before it ran.
        """
        for name, (tensor, version) in before.items():
            if tensor._version != version and storage_key(tensor) not in self._seen:
                raise RuntimeError(
                    f"it writes on {name!r} where a trace cannot see it, which a graph cannot hold"
                )
