"""Regions of a forward that a context manager begins, as `with torch.no_grad():`.

A graph has no regions. One without gradients is traced all the same: what has a gradient is
detached before each operation in it. A detached tensor has the same memory, so writes on it are
those of the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from sffx.compiler.facts import facts
from sffx.compiler.trace.proxy import TensorProxy
from sffx.tensors import tensors_in


class Regions:
    """The regions that the forward of one trace enters."""

    def __init__(self) -> None:
        self._outside = _switches()
        self._detached: set[fx.Node] = set()
        self._is_switched_off = False

    def switch_gradients(self, switch: Callable[[bool], None], mode: bool) -> None:
        """Stand in for what every context manager calls, and no autograd function does."""
        self._is_switched_off = not mode
        switch(mode)

    def is_without_gradients(self) -> bool:
        """Whether the forward is in a region of `torch.no_grad()`.

        Raises:
            RuntimeError: it is in another region, such as one of `torch.autocast()`.
        """
        switches = _switches()
        if switches[1:] != self._outside[1:]:
            raise RuntimeError(_CANNOT_BE_HELD)
        is_without = switches[0] != self._outside[0]
        if is_without and not self._is_switched_off:
            raise RuntimeError("it calls an autograd function, which a graph cannot hold")
        return is_without

    def create(self, create_proxy: Callable[..., fx.Proxy], *call: Any, **more: Any) -> fx.Proxy:
        """Create the node of a call in a region without gradients.

        Args:
            create_proxy: creates a node.
            call: the arguments of `create_proxy`: the kind, the target and the arguments of a node.
            more: its other arguments.

        Raises:
            RuntimeError: a module returns several values that learn, or a value with a gradient is
                written.
        """
        kind, target, *arguments = call

        def detached(proxy: fx.Proxy) -> fx.Proxy:
            if not facts(proxy.node).example.requires_grad:
                return proxy
            result = create_proxy("call_method", "detach", (proxy,), {})
            if proxy.node.op != "get_attr":
                self._detached.add(result.node)
            return result

        proxy = create_proxy(kind, target, *tree_map_only(TensorProxy, detached, arguments), **more)
        # The result of such a write has the value's gradient, and later readers do as well.
        if not self._detached.isdisjoint(facts(proxy.node).writes):
            raise RuntimeError(_CANNOT_BE_HELD)
        value = facts(proxy.node).example
        if kind != "call_module" or not any(each.requires_grad for each in tensors_in(value)):
            return proxy
        # A layer that learns elsewhere.
        if not isinstance(proxy, TensorProxy):
            raise RuntimeError(_CANNOT_BE_HELD)
        return create_proxy("call_method", "detach", (proxy,), {})


_CANNOT_BE_HELD = (
    "a region like torch.no_grad() or torch.autocast() begins in its forward, which a graph cannot "
    "hold"
)


def _switches() -> tuple[bool, ...]:
    """Return what a context manager in a forward may switch."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
