"""`tensor.data = value` in a forward, as of weights whose length is limited."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from sffx.compiler.facts import facts
from sffx.compiler.trace.flags import is_added
from sffx.tensors import storage_key, tensors_in


def assign_data(proxy: Any, value: Any) -> None:
    """Record the assignment, to a parameter or a buffer, as a write into its memory.

    Raises:
        RuntimeError: someone may still have the old memory. The tensor is no parameter or buffer,
            and may have views; or it was read before, and autograd keeps it. Or the value has
            another shape or dtype.
    """
    new = facts(value.node).example if isinstance(value, fx.Proxy) else value
    old = facts(proxy.node).example
    is_alike = isinstance(new, Tensor) and (new.shape, new.dtype) == (old.shape, old.dtype)
    if proxy.node.op != "get_attr" or not is_alike or _is_read_before(proxy):
        raise RuntimeError("it assigns the .data of a tensor, which a graph cannot hold")
    proxy.data.copy_(value)


def _is_read_before(proxy: Any) -> bool:
    """Return whether a node reads more of a parameter or a buffer than its `.data`."""
    key = storage_key(facts(proxy.node).example)
    for node in proxy.node.graph.nodes:
        tensors: Iterable[Tensor] = ()
        if node.op == "call_module" and not is_added(node):
            module = proxy.tracer.root.get_submodule(str(node.target))
            tensors = (*module.parameters(), *module.buffers())
        elif node.op == "get_attr" and any(user.args[1:] != ("data",) for user in node.users):
            tensors = tensors_in(facts(node).example)
        if any(storage_key(tensor) == key for tensor in tensors):
            return True
    return False
