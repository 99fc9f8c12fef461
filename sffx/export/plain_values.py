"""Numbers and other plain values that cross a cut. Files of ONNX hand on tensors only.

A value that does not depend on the batch becomes a constant of the file. A number that grows with
the batch is computed in the file, from the number of samples.
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

_ELSEWHERE = "Hint: cut elsewhere, policy=[...] takes the names of nodes"


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
        ExportError: a value is a container of tensors, or no tensor tells the number of samples.
    """
    plain: set[str] = set()
    for name in (*stage.inputs, *stage.outputs):
        _require_no_container(name, values[name], stage)
        if not isinstance(values[name], Tensor):
            plain.add(name)
    if not plain:
        return stage
    inputs = tuple(name for name in stage.inputs if name not in plain)
    outputs = tuple(name for name in stage.outputs if name not in plain)
    writer = _Writer(stage, outputs)
    writer.add_tensors(inputs)
    plain_inputs = [name for name in stage.inputs if name in plain]
    growing = [name for name in plain_inputs if name in batched]
    if growing:
        counted, axis = _counted(inputs, batched, stage, growing[0])
        writer.count_samples(counted, axis)
    for name in plain_inputs:
        writer.add_plain(name, values[name], batched.get(name), samples)
    return replace(stage, inputs=inputs, outputs=outputs, run=writer.module())


def _require_no_container(name: str, value: Any, stage: ExitStage) -> None:
    """Raise an ExportError if a value is no tensor and holds tensors."""
    holds_tensors = next(iter(tensors_in(value)), None) is not None
    if isinstance(value, Tensor) or not holds_tensors:
        return
    raise ExportError(
        f"the value {name!r}, a {type(value).__name__} of tensors, crosses a cut at {stage.name}, "
        f"and ONNX hands on single tensors. {_ELSEWHERE}"
    )


def _counted(
    inputs: tuple[str, ...], batched: Mapping[str, BatchAxes], stage: ExitStage, growing: str
) -> tuple[str, BatchAxis]:
    """Return the first input that tells the number of samples, and its batch axis.

    Args:
        inputs: names of the tensors that a stage takes.
        batched: the batch axes of values that have one.
        stage: that reads them.
        growing: the name of a number that grows with the batch.

    Raises:
        ExportError: no input tells it.
    """
    for name in inputs:
        axis = batched.get(name)
        if isinstance(axis, BatchAxis):
            return name, axis
    raise ExportError(
        f"{stage.name} reads {growing!r}, which depends on the number of samples, and no tensor "
        f"that tells it. {_ELSEWHERE}"
    )


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
        """Add the inputs of the new graph, which are tensors."""
        for name in names:
            old = self._inputs[name]
            new = self._graph.create_node("placeholder", str(old.target), name=old.name)
            self._values[old] = new

    def count_samples(self, name: str, axis: BatchAxis) -> None:
        """Take the number of samples from a tensor."""
        tensor = self._values[self._inputs[name]]
        rows = self._graph.call_method("size", (tensor, axis.axis))
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
        if isinstance(value, Size):
            value = tuple(value)
        self._values[self._inputs[name]] = value

    def _growing(self, value: Any, axis: BatchAxes, samples: int) -> Any:
        """Return nodes in the place of the numbers in a value that grow with the batch."""
        if isinstance(value, int):
            return self._graph.call_function(operator.mul, (self._batch, value // samples))
        # One axis stands for all parts.
        axes = axis if isinstance(axis, tuple) else [axis] * len(value)
        parts = []
        for part, own in zip(value, axes, strict=True):
            parts.append(part if own is None else self._growing(part, own, samples))
        return tuple(parts)

    def module(self) -> fx.GraphModule:
        """Return the new stage."""
        for node in self._module.graph.nodes:
            if node.op == "output":
                self._add_output(node)
            elif node.op != "placeholder":
                self._values[node] = self._graph.node_copy(node, self._values.__getitem__)
        self._graph.lint()
        return fx.GraphModule(self._module, self._graph, class_name="Stage").eval()

    def _add_output(self, output: fx.Node) -> None:
        """Return the goodness, and those of the outputs that are tensors."""
        returned: Any = output.args[0]
        goodness, *given = returned
        node_of = dict(zip(self._stage.outputs, given, strict=True))
        kept = [goodness]
        for name in self._outputs:
            kept.append(node_of[name])
        self._graph.output(tuple(self._values[node] for node in kept))
