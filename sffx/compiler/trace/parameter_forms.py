"""Reads of a parameter's shape, dtype or device, which do not use its values.

A node that reads a parameter belongs to the block that has the parameter. These reads must not
bind the code around them to that block, so the graph holds them without the parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sffx.compiler.facts import facts

if TYPE_CHECKING:
    from sffx.compiler.trace.tracer import GuidedTracer

# Methods that read only the dtype and the device of a tensor that is another argument.
_DTYPE_METHODS = ("to", "type_as")

# Methods that read only the shape of a tensor that is another argument.
_SHAPE_METHODS = ("expand_as", "reshape_as", "view_as")

# Functions that read only the shape, the dtype and the device of their first argument.
_LIKE_FUNCTIONS = frozenset(
    {
        torch.empty_like,
        torch.full_like,
        torch.ones_like,
        torch.rand_like,
        torch.randint_like,
        torch.randn_like,
        torch.zeros_like,
    }
)

_DESCRIPTIONS = (bool, int, str, torch.dtype, torch.device)


class ParameterForms:
    """Replaces reads of the form of a parameter.

    Args:
        tracer: makes the graph.
    """

    def __init__(self, tracer: GuidedTracer) -> None:
        self._tracer = tracer
        self._empty: dict[str, Tensor] = {}  # by the qualname of the parameter that each is like

    def arguments(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a method or a function, with no parameter where one is not used.

        `weight.new_zeros(1)`, `x.to(weight)`, `x.view_as(weight)` and `torch.zeros_like(weight)`
        do not use the weight, which may belong to a later block.

        Args:
            target: the name of the method, or the function.
            args: of the call.
            kwargs: of the call.
        """
        if target in _LIKE_FUNCTIONS:
            first, form = 0, self._shaped_like
        elif target in _SHAPE_METHODS:
            first, form = 1, self._shaped_like
        elif target in _DTYPE_METHODS:
            # `weight.to(x)` does use the weight.
            first, form = 1, self._like
        elif isinstance(target, str) and target.startswith("new_"):
            first, form = 0, self._like
        else:
            return args, kwargs
        read = [form(each) if _is_parameter(each) else each for each in args[first:]]
        by_name = {key: form(each) if _is_parameter(each) else each for key, each in kwargs.items()}
        return (*args[:first], *read), by_name

    def value(self, node: fx.Node) -> Any:
        """Return what a node reads of the form of a parameter, and erase the node.

        Sizes are constants. A dtype or a device changes with the model, so it is read off an empty
        tensor that changes as well.
        """
        value = facts(node).example
        name = node.args[1] if node.target is getattr else None
        parameter = node.all_input_nodes[0]
        node.graph.erase_node(node)
        if not isinstance(value, (torch.dtype, torch.device)):
            return value
        like = self._like(self._tracer.proxy(parameter))
        return self._tracer.create_proxy("call_function", getattr, (like, name), {})

    def _like(self, parameter: fx.Proxy) -> fx.Proxy:
        """Return an empty tensor, a constant of the model, with a parameter's dtype and device."""
        key = str(parameter.node.target)
        if key not in self._empty:
            example = facts(parameter.node).example
            self._empty[key] = torch.empty(0, dtype=example.dtype, device=example.device)
        return self._tracer.proxy(self._tracer.create_arg(self._empty[key]))

    def _shaped_like(self, parameter: fx.Proxy) -> Any:
        """Return a tensor without values, with a parameter's shape, dtype and device."""
        return self._like(parameter).new_empty(tuple(facts(parameter.node).example.shape))


def reads_form_alone(node: fx.Node) -> bool:
    """Return whether a node reads a size, a dtype or the like of a parameter, and nothing else."""
    reads = node.all_input_nodes
    if len(reads) != 1 or not _gets_parameter(reads[0]):
        return False
    value = facts(node).example
    parts = value if isinstance(value, tuple) else (value,)  # a shape, or strides
    return all(isinstance(part, _DESCRIPTIONS) for part in parts)


def _is_parameter(value: Any) -> bool:
    return isinstance(value, fx.Proxy) and _gets_parameter(value.node)


def _gets_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(facts(node).example, nn.Parameter)
