"""Numbers and other plain values that cross a cut, where files hand on tensors alone.

What no sample changes becomes part of the file. A number that grows with the batch is computed in
the file, from the number of samples.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Size, Tensor, fx

from sffx.blocks import BatchAxis
from sffx.errors import ExportError
from sffx.export.exit_stage import BatchAxes, ExitStage
from sffx.tensors import tensors_in


def on_tensors(
    stage: ExitStage, values: Mapping[str, Any], batched: Mapping[str, BatchAxes], samples: int
) -> ExitStage:
    """Return a stage that takes and gives tensors alone.

    Args:
        stage: on torch.
        values: its inputs and outputs for an example batch, by name.
        batched: the batch axes of those that have one.
        samples: in the example batch.

    Raises:
        ExportError: a value holds tensors and is none, or no tensor tells the number of samples.
    """
    for name in (*stage.inputs, *stage.outputs):
        if not isinstance(values[name], Tensor) and any(True for _ in tensors_in(values[name])):
            kind = type(values[name]).__name__
            raise ExportError(
                f"the value {name!r}, a {kind} of tensors, crosses a cut at {stage.name}, and ONNX "
                "hands on single tensors. Hint: cut elsewhere, policy=[...] takes names of nodes"
            )
    is_tensor = {name: isinstance(values[name], Tensor) for name in (*stage.inputs, *stage.outputs)}
    if all(is_tensor.values()):
        return stage
    inputs = tuple(name for name in stage.inputs if is_tensor[name])
    outputs = tuple(name for name in stage.outputs if is_tensor[name])
    counted = [name for name in inputs if isinstance(batched.get(name), BatchAxis)]
    growing = [name for name in stage.inputs if name in batched and not is_tensor[name]]
    if growing and not counted:
        raise ExportError(
            f"{stage.name} reads {growing[0]!r}, which depends on the number of samples, and no "
            "tensor that tells it. Hint: cut elsewhere, policy=[...] takes the names of nodes"
        )
    plain = {name: values[name] for name in stage.inputs if not is_tensor[name]}
    writer = _Writer(stage, outputs)
    writer.add_tensors(inputs)
    if growing:
        axis = batched[counted[0]]
        assert isinstance(axis, BatchAxis)  # that of a tensor is
        writer.count_samples(counted[0], axis)
    for name, value in plain.items():
        writer.add_plain(name, value, batched.get(name), samples)
    return replace(stage, inputs=inputs, outputs=outputs, run=writer.module())


class _Writer:
    """Writes the graph of a stage again, with plain values in the place of inputs.

    Args:
        stage: on torch.
        outputs: names of those of its outputs that are tensors.
    """

    def __init__(self, stage: ExitStage, outputs: tuple[str, ...]) -> None:
        assert isinstance(stage.run, fx.GraphModule)
        self._module = stage.run
        self._stage = stage
        self._outputs = outputs
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}
        placeholders = self._module.graph.find_nodes(op="placeholder")
        self._inputs = dict(zip(stage.inputs, placeholders, strict=True))
        self._batch: fx.Node | None = None

    def add_tensors(self, names: tuple[str, ...]) -> None:
        """Add the inputs of the new graph."""
        for name in names:
            old = self._inputs[name]
            new = self._graph.create_node("placeholder", str(old.target), name=old.name)
            self._values[old] = new

    def count_samples(self, name: str, axis: BatchAxis) -> None:
        """Take the number of samples from a tensor."""
        rows = self._graph.call_method("size", (self._values[self._inputs[name]], axis.axis))
        self._batch = self._graph.call_function(operator.floordiv, (rows, axis.rows))

    def add_plain(self, name: str, value: Any, axis: BatchAxes | None, samples: int) -> None:
        """Write a value in the place of an input.

        Args:
            name: of the input.
            value: that it has for an example batch.
            axis: which of its numbers grow with the batch; None where none does.
            samples: in the example batch.
        """
        if axis is not None:
            value = self._growing(value, axis, samples)
        self._values[self._inputs[name]] = tuple(value) if isinstance(value, Size) else value

    def _growing(self, value: Any, axis: BatchAxes, samples: int) -> Any:
        """Return nodes in the place of the numbers in a value that grow with the batch."""
        if isinstance(value, int):
            return self._graph.call_function(operator.mul, (self._batch, value // samples))
        axes = axis if isinstance(axis, tuple) else [axis] * len(value)
        parts = []
        for part, own in zip(value, axes, strict=True):
            parts.append(part if own is None else self._growing(part, own, samples))
        return tuple(parts)

    def module(self) -> fx.GraphModule:
        """Return the new stage."""
        for node in self._module.graph.nodes:
            if node.op == "output":
                goodness, *given = node.args[0]
                named = dict(zip(self._stage.outputs, given, strict=True))
                kept = [goodness, *(named[name] for name in self._outputs)]
                self._graph.output(tuple(self._values[each] for each in kept))
            elif node.op != "placeholder":
                self._values[node] = self._graph.node_copy(node, self._values.__getitem__)
        self._graph.lint()
        return fx.GraphModule(self._module, self._graph, class_name="Stage").eval()
