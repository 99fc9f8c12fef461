"""What the modules of a model hold, and which modules a forward calls with something else.

`torch.func.functional_call` puts other tensors into a module for one call. A forward may also set
an attribute of a layer before it calls it, as `self.dropout.p = 0.1`. Such a layer cannot be a leaf
of a graph, which would compute with what the layer holds itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sffx.compiler.trace.code_names import forward_of, functions_reached, names_in
from sffx.compiler.trace.proxy import TensorProxy
from sffx.tensors import OF_EVERY_MODULE

_PLAIN = (bool, int, float, str)


class OwnState:
    """The parameters, buffers and attributes of the modules of a model.

    Args:
        model: before its forward runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        # With the tensors: the `id` of one that was freed could be that of another.
        self._names: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            self._names[id(tensor)] = (name, tensor)
        self._held: dict[nn.Module, dict[str, Any]] = {}
        self.note(model)

    def name(self, tensor: Any) -> str | None:
        """Return the qualname of a parameter or a buffer of the model, None for another tensor."""
        name, _ = self._names.get(id(tensor), (None, None))
        return name

    def note(self, module: nn.Module) -> None:
        """Take what the parts of a module hold now as their own, since a leaf may have set it."""
        for part in module.modules():
            self._held[part] = _held_in(part)

    def replaced(self, module: nn.Module, given: Sequence[Any] = ()) -> str:
        """Return the name of something that a forward has replaced in a module; "" if nothing.

        Args:
            module: with its parts.
            given: values that do not count as replacements.

        Returns:
            The name of a parameter, a buffer or an attribute.
        """
        allowed = {id(value) for value in given}
        for part in module.modules():
            own = self._held.get(part, {})
            now = _held_in(part)
            for name, value in own.items():
                value_now = now.get(name)
                if id(value_now) not in allowed and _is_other(value, value_now):
                    return name
            made = now.keys() - own.keys()
            # An attribute that the part itself does not use is there for others to look at.
            used = made.intersection(_words_of(type(part))) if made else ()
            if used:
                return min(used)
        return ""

    def assigned_parameter(self, model: nn.Module) -> str:
        """Return the qualname of a parameter that another tensor has replaced; "" if none."""
        now = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in self._parameters.items():
            if name in now and now[name] is not parameter:
                return name
        return ""


def tensors_left(model: nn.Module) -> list[str]:
    """Return the qualnames of the attributes in which a traced forward has left tensors."""
    found = []
    for qualname, module in model.named_modules():
        for name, value in vars(module).items():
            if name in OF_EVERY_MODULE:
                continue
            if any(isinstance(leaf, TensorProxy) for leaf in tree_leaves(value)):
                found.append(f"{qualname}.{name}".strip("."))
    return found


def _held_in(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    held = {**module._parameters, **module._buffers}
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            held[name] = value
    return held


def _is_other(own: Any, now: Any) -> bool:
    """Return whether a value that a forward may have set is another one than that of the module."""
    if own is now:
        return False
    if own is None and not isinstance(now, (fx.Proxy, *_PLAIN)):
        return False  # a table that the first call makes, and later calls only read
    are_plain = all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((own, now)))
    return not are_plain or bool(own != now)


def _words_of(kind: type[nn.Module]) -> set[str]:
    """Return the names in the code that the forward of a class reaches."""
    words: set[str] = set()
    for function in functions_reached(forward_of(kind), kind):
        words.update(names_in(function.__code__))
    return words
