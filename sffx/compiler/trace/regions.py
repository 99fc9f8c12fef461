"""Regions of a forward that a context manager begins, as `with torch.no_grad():`.

A graph has no regions.

1. A region without gradients is traced: each operation in it reads detached values. A detached
   tensor shares the memory, so a write on it is the write of the forward.
2. A region that changes values (`torch.autocast`, a default dtype or device) makes a leaf.
3. A region that changes how values are computed or kept (`sdpa_kernel`, `save_on_cpu`) is left out,
   and noted.

A forward may also ask for such a state, as by `torch.is_grad_enabled()`. The graph holds the
answer, and a note says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.backends import cuda, cudnn, mkldnn
from torch.utils._pytree import tree_map_only

from sffx.compiler.facts import facts
from sffx.compiler.trace.code_names import package_of
from sffx.compiler.trace.proxy import TensorProxy
from sffx.tensors import tensors_in


class Regions:
    """The regions that the forward of one trace enters.

    Attributes:
        left_out: the functions whose regions the graph leaves out, in order, for the notes.
        asked: the questions about torch's state that the forward asks, in order, for the notes.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, None] = {}
        self.asked: dict[str, None] = {}
        # Of torch, outside of all regions.
        self._has_gradients = torch.is_grad_enabled()
        self._switches = _switches()
        self._kernels = _choices_of_kernels()
        self._detached: set[fx.Node] = set()
        # Whether a context manager has switched gradients off, and not an autograd function.
        self._is_without_by_context = False

    def switch_gradients(self, switch: Callable[[bool], None], mode: bool) -> None:
        """Stand in for the switch that context managers call, and autograd functions do not."""
        self._is_without_by_context = not mode
        switch(mode)

    def is_without_gradients(self) -> bool:
        """Whether the forward is in a region of `torch.no_grad()`.

        Raises:
            RuntimeError: it is in another region, such as one of `torch.autocast()`.
        """
        self._note_choices_of_kernels()
        if _switches() != self._switches:
            raise RuntimeError(_CANNOT_BE_HELD)
        is_without = torch.is_grad_enabled() != self._has_gradients
        if is_without and not self._is_without_by_context:
            raise RuntimeError("it calls an autograd function, which a graph cannot hold")
        return is_without

    def _note_choices_of_kernels(self) -> None:
        """Note regions that choose kernels otherwise: the graph leaves them out."""
        for name, choice in _choices_of_kernels().items():
            if choice != self._kernels[name]:
                self.left_out[name] = None

    def enter_autocast(self, is_on: bool, place: str) -> None:
        """Note that a forward enters `torch.autocast`, on or off.

        Raises:
            RuntimeError: it is on, or the forward is that of a module which may be a leaf.
        """
        if is_on or place:
            raise RuntimeError(_CANNOT_BE_HELD)
        self.left_out["torch.autocast(enabled=False)"] = None

    def enter_enable_grad(self, place: str) -> None:
        """Note that a forward enters `torch.enable_grad`, which matters under `torch.no_grad()`.

        Raises:
            RuntimeError: the forward is that of a module which may be a leaf.
        """
        if place:
            raise RuntimeError(_CANNOT_BE_HELD)
        self.left_out["torch.enable_grad"] = None

    def enter_hooks(self, kind: type) -> None:
        """Note that a forward enters hooks on what autograd keeps.

        Args:
            kind: `saved_tensors_hooks` or a subclass. torch's private ones go by the public name.
        """
        name = "saved_tensors_hooks" if kind.__name__.startswith("_") else kind.__name__
        self.left_out[f"torch.autograd.graph.{name}"] = None

    def answer(self, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note that a forward asks for a state of torch, and answer as torch does."""
        if not is_of_torch(sys._getframe(1)):
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
        detach = partial(self._detach, create_proxy)
        arguments = tree_map_only(TensorProxy, detach, arguments)
        proxy = create_proxy(kind, target, *arguments, **more)
        # In the model the written value keeps its gradient. Here its detached twin was written.
        if not self._detached.isdisjoint(facts(proxy.node).writes):
            raise RuntimeError(_CANNOT_BE_HELD)
        value = facts(proxy.node).example
        has_gradient = any(each.requires_grad for each in tensors_in(value))
        # A layer has parameters with gradients, though its input has none.
        if kind != "call_module" or not has_gradient:
            return proxy
        if not isinstance(proxy, TensorProxy):
            raise RuntimeError(_CANNOT_BE_HELD)
        return create_proxy("call_method", "detach", (proxy,), {})

    def _detach(self, create_proxy: Callable[..., fx.Proxy], proxy: fx.Proxy) -> fx.Proxy:
        """Return a proxy of the same value without a gradient."""
        if not facts(proxy.node).example.requires_grad:
            return proxy
        detached = create_proxy("call_method", "detach", (proxy,), {})
        if proxy.node.op != "get_attr":
            self._detached.add(detached.node)
        return detached


_CANNOT_BE_HELD = (
    "a region like torch.autocast() or torch.inference_mode() begins in its forward, which a graph "
    "cannot hold"
)


def is_of_torch(frame: FrameType) -> bool:
    """Whether the code of a frame is torch's, or that of sffx, and not a model's."""
    return package_of(frame.f_globals) in ("torch", "sffx")


def _switches() -> tuple[Any, ...]:
    """Return the states, beside gradients, that a context manager in a forward may switch."""
    modes_of_torch = [
        mode for mode in _function_modes() if type(mode).__module__.startswith("torch.")
    ]
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        # `with torch.device("cuda"):` adds a mode. The trace's own mode, `Constants`, is no matter.
        len(modes_of_torch),
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
