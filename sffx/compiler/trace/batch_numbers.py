"""The builtins `len`, `int` and `float` of what depends on the batch size.

Python wants a plain number of them, which a graph would freeze. So a trace that has met one fails,
and in the next attempt other functions stand in for them, which return nodes. They stand in the
files alone whose code has asked, since all other code of the process uses builtins as well.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sffx.compiler.facts import facts
from sffx.compiler.trace.batch import has_length_of_batch
from sffx.compiler.trace.proxy import GuidedProxy


class AskedBuiltins:
    """The files that asked for the batch size by a builtin."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], dict[str, Any]] = {}
        self._has_new = False

    def note(self, name: str, caller: FrameType) -> None:
        """Note that code has called a builtin."""
        names = caller.f_globals
        # A name of the file's own is no builtin. It then called another function, which asked.
        if name not in names and (id(names), name) not in self._found:
            self._found[id(names), name] = names
            self._has_new = True

    def take_new(self) -> bool:
        """Return whether one was noted since the last call."""
        has_new = self._has_new
        self._has_new = False
        return has_new

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Let names in these files stand in for the builtins."""
        with ExitStack() as stack:
            for (_, name), names in self._found.items():
                names[name] = _STAND_INS[name]
                stack.callback(names.pop, name)
            yield


def _length(value: Any, /) -> Any:
    """Stand in for `len`."""
    if isinstance(value, GuidedProxy) and isinstance(value.example, Tensor):
        return value.size(0) if has_length_of_batch(value.node) else len(value)
    return len(value)


class _StandIn(type):
    """The class of what stands in for a class of numbers, in a call and in questions for classes.

    Attributes:
        original: the class.
        convert: makes a node of a number of another class.
    """

    original: type
    convert: Callable[[Any], Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        value = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(value, GuidedProxy) or not _is_number_of_batch(value):
            return cls.original(*args, **kwargs)
        if isinstance(value.example, cls.original):
            return value
        return value.tracer.create_proxy("call_function", cls.convert, (value,), {})

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.original)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)


class _Int(int, metaclass=_StandIn):
    original = int
    convert = torch.sym_int


class _Float(float, metaclass=_StandIn):
    original = float
    convert = torch.sym_float


def _is_number_of_batch(value: GuidedProxy) -> bool:
    # A truth value is settled, as the branch on it is.
    is_number = isinstance(value.example, (int, float)) and not isinstance(value.example, bool)
    return is_number and facts(value.node).of_batch


_STAND_INS: dict[str, Any] = {
    builtins.len.__name__: _length,
    builtins.int.__name__: _Int,
    builtins.float.__name__: _Float,
}
