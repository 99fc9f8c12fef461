"""Regions of a forward that a context manager begins, as `with torch.no_grad():`.

A graph has no regions.

1. One without gradients is traced all the same: what has a gradient is detached before each
   operation in it. A detached tensor has the same memory, so writes on it are those of the forward.
2. One that changes values (`torch.autocast`, a default dtype or device) makes a leaf.
3. One that changes how values are computed or kept (`sdpa_kernel`, `save_on_cpu`) is left out, and
   noted. So is the answer to `torch.is_grad_enabled()`, which a graph holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.backends import cuda, cudnn, mkldnn
from torch.utils._pytree import tree_map_only

from sffx.compiler.facts import facts
from sffx.compiler.trace.proxy import TensorProxy
from sffx.tensors import tensors_in


class Regions:
    """The regions that the forward of one trace enters.

    Attributes:
        left_out: what of them is no part of the graph, as a reader knows it.
        asked: the states of torch that the forward asks for.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, None] = {}
        self.asked: dict[str, None] = {}
        self._outside = _switches()
        self._kernels = _choices_of_kernels()
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
        for name, choice in _choices_of_kernels().items():
            if choice != self._kernels[name]:
                self.left_out[name] = None
        switches = _switches()
        if switches[1:] != self._outside[1:]:
            raise RuntimeError(_CANNOT_BE_HELD)
        is_without: bool = switches[0] != self._outside[0]
        if is_without and not self._is_switched_off:
            raise RuntimeError("it calls an autograd function, which a graph cannot hold")
        return is_without

    def enter_autocast(self, is_on: bool, place: str) -> None:
        """Note that a forward enters `torch.autocast`, on or off.

        Raises:
            RuntimeError: it is on, or the forward is that of a module which may be a leaf.
        """
        if is_on or place:
            raise RuntimeError(_CANNOT_BE_HELD)
        self.left_out["torch.autocast(enabled=False)"] = None

    def enter_enable_grad(self, place: str) -> None:
        """Note that a forward enters `torch.enable_grad`, which tells under `torch.no_grad()`.

        Raises:
            RuntimeError: the forward is that of a module which may be a leaf.
        """
        if place:
            raise RuntimeError(_CANNOT_BE_HELD)
        self.left_out["torch.enable_grad"] = None

    def enter_hooks(self, kind: type) -> None:
        """Note that a forward enters hooks on what autograd keeps."""
        name = "saved_tensors_hooks" if kind.__name__.startswith("_") else kind.__name__
        self.left_out[f"torch.autograd.graph.{name}"] = None

    def answer(self, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note that a forward asks for a state of torch, and answer as torch does."""
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.partition(".")[0] not in ("torch", "sffx"):
            self.asked[f"torch.{ask.__name__}()"] = None
        return ask(*args, **kwargs)

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
    "a region like torch.autocast() or torch.inference_mode() begins in its forward, which a graph "
    "cannot hold"
)


def _switches() -> tuple[Any, ...]:
    """Return what a context manager in a forward may switch."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        # As `with torch.device("cuda"):` adds one. A node may add one for the rest of the trace.
        sum(type(mode).__module__.startswith("torch.") for mode in _function_modes()),
    )


def _function_modes() -> list[Any]:
    modes: list[Any] = torch.overrides._get_current_function_mode_stack()
    return modes


def _choices_of_kernels() -> dict[str, Any]:
    """Return how torch is told to choose kernels, by the names of the functions that tell it."""
    return {
        "torch.nn.attention.sdpa_kernel": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        "torch.backends.cudnn.flags": (
            cudnn.enabled,
            cudnn.benchmark,
            cudnn.deterministic,
        ),
        "torch.backends.mkldnn.flags": mkldnn.enabled,
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.set_float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
