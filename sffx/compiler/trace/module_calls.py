"""How a forward calls the modules of a model: as leaves, or into their own forwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sffx.compiler.trace.identity import require_no_identity
from sffx.compiler.trace.leaves import has_no_code
from sffx.compiler.trace.randomness import call_without_draws
from sffx.compiler.trace.writes import versions

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer


class ModuleCalls:
    """Calls the modules of a model for a tracer.

    Args:
        tracer: that traces the model.
    """

    def __init__(self, tracer: GuidedTracer) -> None:
        self._tracer = tracer
        self._entered: list[nn.Module] = []  # those whose own `__call__` runs, innermost last

    def call(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        call_module: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a module: create a node for a leaf, and trace the forward of another one.

        Args:
            m: the module.
            forward: calls it, and its hooks.
            call_module: that of fx, which asks whether the module is a leaf.
            args: of the call.
            kwargs: of the call.

        Raises:
            RuntimeError: the module can be no leaf, and its forward cannot be traced.
        """
        tracer = self._tracer
        is_root = m is tracer.root
        if self._is_entered(m):
            # The `__call__` of its class now calls that of `nn.Module`. Hooks of the model itself
            # are no part of what is traced.
            return m.forward(*args, **kwargs) if is_root else forward(*args, **kwargs)
        # A module that a forward makes for itself is part of its code.
        is_part_of_model = m in (tracer.submodule_paths or ())
        if is_root or tracer.is_running or not is_part_of_model:
            return forward(*args, **kwargs)
        qualname = tracer.path_of_module(m)
        if tracer.is_leaf_module(m, qualname):
            self._open_if_replaced(m, (args, kwargs))
        # Asked again, since a layer that was opened is no leaf any more.
        is_leaf = tracer.is_leaf_module(m, qualname)
        if is_leaf and m in tracer.opened:
            raise RuntimeError(self._why_no_leaf(m, qualname))
        call = functools.partial(call_module, m, forward, args, kwargs)
        try:
            return self._call_leaf(m, call) if is_leaf else self._trace(m, call)
        except Exception:
            # A leaf is one already, and a container has no code that could have failed. The module
            # around them may do as a leaf.
            if tracer.failed is None and not is_leaf and not has_no_code(m):
                tracer.failed = qualname
            raise

    def call_by_class(
        self, call: Callable[..., Any], m: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a module whose class has a `__call__` of its own, which fx does not know of."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._entered.append(m)
            try:
                return call(m, *args, **kwargs)
            finally:
                self._entered.pop()

        if self._is_entered(m):  # by the `__call__` of a subclass
            return call(m, *args, **kwargs)
        return self._tracer.call_module(m, forward, args, kwargs)

    def _is_entered(self, m: nn.Module) -> bool:
        return bool(self._entered) and self._entered[-1] is m

    def _open_if_replaced(self, m: nn.Module, given: Any) -> None:
        """Open a module for the next attempt if a forward has set what it holds.

        Args:
            m: that would be called as a leaf.
            given: its arguments. A module may have one of them as its state.
        """
        tracer = self._tracer
        if m in tracer.opened:
            return
        name = tracer.own.replaced(m, tree_leaves(given))
        if name:
            tracer.opened[m] = name
            tracer.has_opened = True

    def _why_no_leaf(self, m: nn.Module, qualname: str) -> str:
        """Return why a module that cannot be traced can be no leaf either."""
        layer = f"{qualname}, a {type(m).__name__}"
        attribute = self._tracer.opened[m]
        reason = f"the attribute {attribute!r} of {layer}, is set while it does not run"
        if not attribute:
            reason = f"the forward reads what a hook of {layer}, may have kept"
        return f"{reason}, and it cannot be traced: {self._tracer.leaves[qualname]}"

    def _call_leaf(self, m: nn.Module, call: Callable[[], Any]) -> Any:
        """Create the node of a leaf, and note what the leaf writes and holds.

        A leaf runs with the generators restored, so nothing looks at them here. To compare their
        states for each leaf would cost a tenth of the trace.
        """
        tracer = self._tracer
        before = versions(m)
        self._require_hooks_of_model(m)
        value = tracer.views.call_without_reads(call)
        tracer.writes.note_leaf(before)
        tracer.own.note(m)
        return value

    def _trace(self, m: nn.Module, call: Callable[[], Any]) -> Any:
        """Trace the forward of a module. What it draws and writes must be in nodes."""
        before = versions(m)
        require_no_identity(m)
        value = call_without_draws(call)
        self._tracer.writes.require_seen(before)
        return value

    def _require_hooks_of_model(self, m: nn.Module) -> None:
        """Raise a RuntimeError if a forward has set hooks on a leaf for the time of a call."""
        if isinstance(m, torch.jit.ScriptModule):
            return
        own = self._tracer.original.get_submodule(self._tracer.path_of_module(m))
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            if len(vars(m)[hooks]) != len(vars(own)[hooks]):
                raise RuntimeError("it sets a hook on a layer that it calls, which is lost")
