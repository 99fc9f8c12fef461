"""Keep numbers that ONNX Script's optimizer takes for 0 or 1.

The optimizer removes `x + 0` and `x * 1`, and compares with a tolerance. So it removes `x + 1e-8`
as well. A logarithm or a quotient that this number guards is then infinite or not a number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from onnxscript import ir

# The number that an operation can do without, and the tolerances of the optimizer's comparison.
_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
_RELATIVE = 1e-5
_ABSOLUTE = 1e-8


def keep_small_numbers(model: ir.Model) -> None:
    """Give such numbers one axis, since the optimizer compares numbers without axes alone.

    The other operand has axes of its own, so the result keeps its shape.

    Args:
        model: to alter, not optimized yet.
    """
    from onnxscript import ir

    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type not in _NEUTRAL or node.domain:
            continue
        for index, value in enumerate(node.inputs):
            other = node.inputs[1 - index]
            number = _number(value)
            if number is None or not _has_axes(other):
                continue
            if _is_taken_for(number.item(), _NEUTRAL[node.op_type]):
                node.replace_input_with(index, _with_axis(number, node, index, model.graph))


def _number(value: ir.Value | None) -> numpy.ndarray | None:
    """Return a constant without axes, None for any other value."""
    from onnxscript import ir

    if value is None:
        return None
    constant = ir.convenience.get_const_tensor(value)
    if constant is None or constant.shape.rank() != 0:
        return None
    return constant.numpy()


def _has_axes(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and value.shape.rank() > 0


def _is_taken_for(number: float, neutral: float) -> bool:
    """Return whether the optimizer takes a number for another one."""
    is_close = math.isclose(number, neutral, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return is_close and number != neutral


def _with_axis(number: numpy.ndarray, node: ir.Node, index: int, graph: ir.Graph) -> ir.Value:
    """Return a new constant of shape (1,)."""
    from onnxscript import ir

    name = f"{node.outputs[0].name}_number_{index}"
    tensor = ir.tensor(number.reshape(1), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value
