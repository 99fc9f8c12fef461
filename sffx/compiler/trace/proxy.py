"""A proxy that has an example of its value, and so can answer what a plain fx proxy cannot."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from sffx.compiler.facts import facts
from sffx.compiler.trace.assigned_data import assign_data
from sffx.compiler.trace.batch import FROZEN_BATCH
from sffx.compiler.trace.effects import set_item
from sffx.compiler.trace.listed import is_listed


def has_proxy(*values: Any) -> bool:
    """Whether a proxy is among values, or anywhere in the lists, tuples and mappings among them."""
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(values))


def has_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether arguments, or the shapes among them, hold a proxy that stands for no tensor."""
    for value in (*args, *kwargs.values()):
        # Not `isinstance`: the proxy of a shape says that it is a tuple.
        is_shape = type(value) in (tuple, list, Size)
        if any(map(_is_proxy_of_size, value if is_shape else (value,))):
            return True
    return False


def _is_proxy_of_size(value: Any) -> bool:
    return isinstance(value, GuidedProxy) and not isinstance(value, TensorProxy)


def _kind(value: Any) -> type:
    """Return the class of a value in the model, where nothing is fake."""
    if is_listed(value):
        return list
    if not isinstance(value, FakeTensor):
        return type(value)
    return nn.Parameter if isinstance(value, nn.Parameter) else Tensor


class GuidedProxy(fx.Proxy):
    """A proxy that answers `len`, `int`, `isinstance` and attribute reads from its example.

    A `TensorProxy` stands for a tensor, and a `SequenceProxy` for a shape or the like.
    """

    @property
    def example(self) -> Any:
        return facts(self.node).example

    @property
    def kind(self) -> type:
        """The class that the value has in the model."""
        return _kind(self.example)

    # `isinstance` and `match` look at this, beside the real type.
    __class__ = property(lambda self: self.kind)

    def __getattr__(self, name: str) -> Any:
        # fx takes every attribute for a method until something else is done with it than a call.
        # Here the example tells what it is.
        if callable(getattr(self.example, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            assign_data(self, value)
            return
        fx.Proxy.__setattr__(self, name, value)

    def __len__(self) -> int:
        tracer: Any = self.tracer
        return tracer.settled.length(self, sys._getframe(1))

    def __index__(self) -> int:
        # Without the caller: `range(n)` and `values[n]` call no builtin that could be replaced.
        return self._number(int)

    def __int__(self) -> int:
        return self._number(int, sys._getframe(1))

    def __float__(self) -> float:
        return self._number(float, sys._getframe(1))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __hash__(self) -> int:
        # A size among the keys of a dictionary or a set is that number.
        if not isinstance(self.example, (int, float, str, tuple)):
            return object.__hash__(self)
        if facts(self.node).of_batch:
            # Python's error for what has no hash: code with a cache (einops) then does without it.
            raise TypeError(f"unhashable: {FROZEN_BATCH}")
        if isinstance(self.example, int):
            tracer: Any = self.tracer
            tracer.settled.settle(self.node, self.example)
        return hash(self.example)

    def __str__(self) -> str:
        # A size in a text may be a part of a name, `getattr(self, f"layer{x.shape[1]}")`.
        return str(self._as_written())

    def __format__(self, form: str) -> str:
        return format(self._as_written(), form)

    def _as_written(self) -> Any:
        """Return what a text shows of the proxy: its value if that is plain, else its own name."""
        example = self.example
        if isinstance(example, (int, float)):
            return self._number(type(example))
        is_plain = isinstance(example, (str, torch.dtype, torch.device))
        return example if is_plain else repr(self)

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Let a function of NumPy, as `np.sqrt(x.shape[1])`, compute with plain numbers.

        An operator stays one: `np.float64(2) * x.shape[1]` is a node.
        """
        is_operator = function in _OPERATORS and method == "__call__" and not options
        if is_operator:
            operands = [each.item() if isinstance(each, np.generic) else each for each in inputs]
            return _OPERATORS[function](*operands)
        compute = getattr(function, method)
        return compute(*map(_as_numbers, inputs), **options)

    def _number(self, kind: type, caller: FrameType | None = None) -> Any:
        """Return the example as a plain number, which the graph will hold.

        Args:
            kind: of number.
            caller: the code that called this class, if it did.

        Raises:
            RuntimeError: it depends on the batch size.
        """
        tracer: Any = self.tracer
        if isinstance(self.example, Tensor):
            return kind(tracer.settled.value_of_sizes(self.node))
        if isinstance(self.example, bool):
            # `int(x.shape[0] == 1)` is settled as a branch on the comparison is.
            return kind(bool(self))
        if facts(self.node).of_batch:
            if caller is not None:
                tracer.functions.asked.note(kind.__name__, caller)
            raise RuntimeError(FROZEN_BATCH)
        number = kind(self.example)
        tracer.settled.settle(self.node, number)
        return number


# The operators that NumPy calls by functions of its own.
_OPERATORS = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.true_divide: operator.truediv,
    np.floor_divide: operator.floordiv,
    np.remainder: operator.mod,
    np.power: operator.pow,
}


def _as_numbers(value: Any) -> Any:
    """Return the plain number in the place of a proxy, or those of a shape."""
    if isinstance(value, SequenceProxy):
        parts: Any = value
        return [_as_numbers(parts[i]) for i in range(len(parts))]
    if isinstance(value, GuidedProxy):
        return value._number(type(value.example))
    return value


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


class SequenceProxy(GuidedProxy):
    """The proxy of a tuple or a list, which `match` takes apart as one."""


Sequence.register(SequenceProxy)


class TypeOfValues(type):
    """The class of `KindOf`, which is used as `type` is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1:
            return type(*args, **kwargs)
        kind = args[0].kind if isinstance(args[0], GuidedProxy) else _kind(args[0])
        return _STAND_INS.get(kind, kind)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)

    def __eq__(cls, other: Any) -> bool:
        return other is cls or other is type

    __hash__ = type.__hash__


class KindOf(metaclass=TypeOfValues):
    """Stands in for `type` in the files of a model: the type of a proxy is that of its value."""

    def __class_getitem__(cls, kind: Any) -> Any:
        return type[kind]


class TypeOfShapes(type):
    """The class of `ShapeOf`, which is used as `torch.Size` is."""

    def __call__(cls, sizes: Any = ()) -> Any:
        if not isinstance(sizes, (Sequence, fx.Proxy)):
            sizes = tuple(sizes)
        if not has_proxy(sizes):
            return Size(sizes)
        first = next(leaf for leaf in tree_leaves(sizes) if isinstance(leaf, fx.Proxy))
        return first.tracer.create_proxy("call_function", Size, (sizes,), {})

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, Size)

    def __subclasscheck__(cls, kind: type) -> bool:
        return kind is cls or issubclass(kind, Size)

    def __eq__(cls, other: Any) -> bool:
        return other is cls or other is Size

    def __hash__(cls) -> int:
        return hash(Size)


class ShapeOf(tuple, metaclass=TypeOfShapes):
    """Stands in for `torch.Size` during a trace: its C code takes no proxy of a size."""


# So `type(kind) is type` and `type(x.shape) is torch.Size` are true where these are the names.
_STAND_INS: dict[type, type] = {
    type: KindOf,
    TypeOfValues: KindOf,
    TypeOfShapes: KindOf,
    Size: ShapeOf,
}


class TensorProxy(GuidedProxy, Tensor):  # type: ignore[misc]
    """The proxy of a tensor, which is a tensor in memory as well, without data.

    torch's parser of arguments looks into the memory of whatever `isinstance` calls a tensor,
    before it asks for `__torch_function__`. A proxy that only says so would end the process.
    """

    @staticmethod
    def __new__(cls, node: fx.Node, tracer: fx.Tracer) -> TensorProxy:
        example = facts(node).example
        # torch's parser chooses an overload by the shape.
        return Tensor._make_wrapper_subclass(
            cls, example.shape, dtype=example.dtype, device=example.device
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what got past `__torch_function__`, where fx records every call."""
        raise RuntimeError(
            f"it calls {func} where a trace cannot see it, which a graph cannot hold"
        )

    def __getattribute__(self, name: str) -> Any:
        # Tensor's own attributes would be read from the memory of the proxy, and be no nodes.
        own: dict[str, Any] = object.__getattribute__(self, "__dict__")
        if name in own:
            return own[name]
        if name in _NAMES_OF_PROXIES or name.startswith("__"):
            return object.__getattribute__(self, name)
        return GuidedProxy.__getattr__(self, name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, index, value), {})

    __hash__ = object.__hash__

    # With None, NumPy leaves `np.float64(2) * x` to this class.
    __array_ufunc__ = None  # type: ignore[assignment]

    # Texts of error messages are written in a trace as well. Tensor's own would be a node.
    __format__: Any = object.__format__


_NAMES_OF_PROXIES = frozenset(dir(GuidedProxy))
