"""A proxy that has an example of its value, and so can answer what a plain fx proxy cannot."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from sffx.compiler.facts import facts
from sffx.compiler.trace.batch import FROZEN_BATCH, length


def has_proxy(*values: Any) -> bool:
    """Whether a proxy is among values, or anywhere in the lists, tuples and mappings among them."""
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(values))


class GuidedProxy(fx.Proxy):
    """A proxy that answers `len`, `int`, `isinstance` and attribute reads from its example."""

    @property
    def example(self) -> Any:
        return facts(self.node).example

    def __getattr__(self, name: str) -> Any:
        # fx takes every attribute for a method until it is read otherwise. The example tells which.
        if callable(getattr(self.example, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Answer `isinstance(x, Tensor)` as the value would; a plain proxy is no tensor."""
        return Tensor if isinstance(self.example, Tensor) else GuidedProxy

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise RuntimeError("it assigns the .data of a tensor, which a graph cannot hold")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return length(self.example)

    def __index__(self) -> int:
        return self._number(int)

    def __int__(self) -> int:
        return self._number(int)

    def __float__(self) -> float:
        return self._number(float)

    def _number(self, kind: Callable[[Any], Any]) -> Any:
        """Return the example as a plain number, which the graph will hold."""
        if isinstance(self.example, Tensor):
            raise RuntimeError("a number is read from a tensor, which depends on the data")
        if facts(self.node).of_batch:
            raise RuntimeError(FROZEN_BATCH)
        return kind(self.example)


def _in_place(name: str) -> Callable[[GuidedProxy, Any], Any]:
    """Return the method for `x += y` and its like.

    On a tensor these write in place, under all names of the tensor. fx has no such methods, so
    Python would call `__add__` and the other names would keep the old value.
    """

    def operate(self: GuidedProxy, other: Any) -> Any:
        # Numbers have no in-place form.
        function = f"i{name}" if isinstance(self.example, Tensor) else name
        target = getattr(operator, function)
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=name)

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(GuidedProxy, f"__i{_name}__", _in_place(_name))
