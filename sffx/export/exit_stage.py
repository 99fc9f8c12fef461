"""The stages of an early exit: on torch, made from a cut model, or on ONNX Runtime, from files.

A stage of an early exit begins with the norm of the block before, where a stage of training ends
with its own norm. So the norm is not computed for samples that have left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from sffx.blocks import BatchAxis, Value
from sffx.compiler.facts import Cost
from sffx.compiler.sample_order import is_out_of_order
from sffx.compiler.trace.costs import CountMacs
from sffx.errors import InputError
from sffx.inputs import like_the_model, random_batch
from sffx.net import plan_of
from sffx.runtime.stage import nodes_read_by, placeholders_of, stages_of

# The batch axis of most values.
FIRST_AXIS = BatchAxis(0)

# The batch axis of a value, or the axes of the parts of a tuple. A part that does not depend on the
# batch has None.
BatchAxes: TypeAlias = BatchAxis | tuple["BatchAxes | None", ...]


@dataclass(frozen=True)
class ExitStage:
    """One block with its head, and before it the norm of the block before.

    Attributes:
        name: of the block, "block_0".
        inputs: names of the values that it reads.
        outputs: names of the values that later stages read.
        macs: multiply-adds for one sample, the head included.
        run: takes the inputs, in order; returns the goodness, (B, J), and then the outputs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    run: Callable[..., Sequence[Any]]

    def score(self, values: dict[str, Any]) -> Tensor:
        """Run on the values that it reads, add its outputs to them, and return the goodness."""
        arguments = [values[name] for name in self.inputs]
        goodness, *outputs = self.run(*arguments)
        values.update(zip(self.outputs, outputs, strict=True))
        return goodness

    def hand_on(self, values: dict[str, Any]) -> None:
        """Do nothing: the next stage begins with this one's norm."""


def exit_stages(net: fx.GraphModule) -> tuple[tuple[ExitStage, ...], dict[str, BatchAxes]]:
    """Return the stages of a net in eval mode, and the batch axes of the values that have one.

    A number that is a multiple of the batch size counts as such a value. The classifier is no stage
    of an early exit.

    Raises:
        InputError: a value that crosses a cut depends on the batch, but not by one axis.
    """
    node_lists = _nodes_of_exits(net)
    # With one number of samples, an axis could have that length by chance.
    of_two = _ExampleRun(net, samples=2)
    of_three = _ExampleRun(net, samples=3)
    stages = []
    for i, block in enumerate(plan_of(net)):
        nodes = node_lists[i]
        inputs = nodes_read_by(nodes)
        read_later = _read_by_any(node_lists[i + 1 :])
        outputs = [node for node in nodes if node in read_later]
        module = _module(net, nodes, inputs, outputs)
        input_names = tuple(_name(node, net) for node in inputs)
        output_names = tuple(_name(node, net) for node in outputs)
        # Not by torch's FlopCounterMode, whose hooks on modules take no parameter as an argument.
        cost_of_two = Cost()
        with CountMacs(cost_of_two):
            of_two.run(module, input_names, output_names)
        of_three.run(module, input_names, output_names)
        macs = cost_of_two.macs // 2
        stages.append(ExitStage(block.target, input_names, output_names, macs, module))
    return tuple(stages), _batch_axes(net, of_two.values, of_three.values)


def _batch_axes(
    net: fx.GraphModule, of_two: Mapping[str, Any], of_three: Mapping[str, Any]
) -> dict[str, BatchAxes]:
    """Return the batch axes of the values that have one.

    Args:
        net: the net.
        of_two: the values of two samples, by name.
        of_three: those of three samples.
    """
    planned: dict[str, BatchAxis | None] = {}
    for block in plan_of(net):
        for value in block.gives:
            _require_in_order(value)
            planned[value.name] = value.batch
    axes: dict[str, BatchAxes] = {}
    for name, value in of_two.items():
        own = planned.get(name)
        axis = _axes_of(value, of_three[name], own)
        if axis is not None:
            axes[name] = axis
        elif _form(value) != _form(of_three[name]):
            raise InputError(
                f"the value {name!r} crosses a cut and depends on the number of samples, but not "
                "by one axis that is the batch, so samples cannot leave it. Hint: cut elsewhere, "
                "policy=[...] takes the names of nodes"
            )
    return axes


def _axes_of(value: Any, other: Any, planned: BatchAxis | None) -> BatchAxes | None:
    """Return the batch axis of a value, or those of the parts of a shape; None where it has none.

    Args:
        value: for two samples.
        other: the same value for three samples.
        planned: its axis by the plan.
    """
    if _has_samples(value, other, FIRST_AXIS):
        return FIRST_AXIS
    # Where the order of the rows is unknown, so are the rows of a sample that leaves.
    if planned is not None and planned.slower is not None and _has_samples(value, other, planned):
        return planned
    return _axes_of_shape(value, other)


def _axes_of_shape(value: Any, other: Any) -> BatchAxes | None:
    """Return which numbers of a shape grow with the batch; None if none does, or if it is no shape.

    Args:
        value: for two samples.
        other: the same value for three samples.
    """
    if not isinstance(value, (tuple, list)) or not isinstance(other, (tuple, list)):
        return None
    if len(value) != len(other) or not all(type(part) is int for part in value):
        return None
    parts: list[BatchAxes | None] = []
    for one, two in zip(value, other, strict=True):
        axis = _axes_of(one, two, None)
        if axis is None and one != two:
            return None
        parts.append(axis)
    return tuple(parts) if any(parts) else None


def _require_in_order(value: Value) -> None:
    """Raise an InputError if a value has its samples in another order, or holds such an order."""
    for each in (value, *value.parts):
        if is_out_of_order(each.batch):
            raise InputError(
                f"the value {value.name!r} crosses a cut and has the samples in another order, as "
                "after a sort, so samples cannot leave it. Hint: cut elsewhere, policy=[...] takes "
                "the names of nodes; or sort in the forward where the sorted samples are read"
            )


def _has_samples(value: Any, other: Any, axis: BatchAxis) -> bool:
    """Return whether values of two and of three samples differ by an axis and nothing else.

    A number has samples if it is in proportion to how many there are. A tuple has them if all its
    parts do.

    Args:
        value: of two samples.
        other: of three samples.
        axis: that holds the samples of a tensor.
    """
    if type(value) is int and type(other) is int:
        return value != other and value * 3 == other * 2
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        pairs = zip(value, other, strict=False)
        return bool(value) and all(_has_samples(one, two, axis) for one, two in pairs)
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    if value.ndim <= axis.axis:
        return False
    of_two = 2 * axis.rows
    of_three = 3 * axis.rows
    expected = list(value.shape)
    expected[axis.axis] = of_three
    return value.shape[axis.axis] == of_two and list(other.shape) == expected


def kept(value: Any, stays: Tensor, axis: BatchAxes) -> Any:
    """Return a value without the samples that leave.

    Args:
        value: a tensor, a number or a tuple of them that has samples; see `_has_samples`.
        stays: for each sample whether it stays, (B,).
        axis: that holds the samples of a tensor, or the axes of the parts of a shape.
    """
    if isinstance(axis, tuple):
        parts = []
        for part, own in zip(value, axis, strict=True):
            parts.append(part if own is None else kept(part, stays, own))
        return type(value)(parts)
    # Neighbouring rows are of one sample, and whole batches of such rows follow each other.
    slower = axis.slower or 1
    neighbours = axis.rows // slower
    row_stays = stays.repeat_interleave(neighbours).repeat(slower)
    rows = row_stays.nonzero().flatten()
    samples_left = int(stays.sum())

    def kept_part(part: Tensor | int) -> Tensor | int:
        if isinstance(part, Tensor):
            return part.index_select(axis.axis, rows.to(part.device))
        of_one_sample = part // len(stays)
        return of_one_sample * samples_left

    return tree_map_only((Tensor, int), kept_part, value)


class _ExampleRun:
    """Example values of a number of samples, stage after stage.

    Attributes:
        values: by name.
    """

    def __init__(self, net: fx.GraphModule, samples: int) -> None:
        inputs = plan_of(net).inputs
        tensors = like_the_model(net, random_batch(inputs, samples))
        self.values: dict[str, Any] = {}
        for each, tensor in zip(inputs, tensors, strict=True):
            self.values[each.name] = tensor

    @torch.no_grad()
    def run(self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        """Run one stage, and add its outputs to the values."""
        arguments = [self.values[name] for name in inputs]
        _goodness, *returned = module(*arguments)
        self.values.update(zip(outputs, returned, strict=True))


def _nodes_of_exits(net: fx.GraphModule) -> list[list[fx.Node]]:
    """Return, for each block, the nodes from the head before it to its own head."""
    node_lists = []
    previous = None
    for stage in stages_of(net)[:-1]:
        node_lists.append(stage.nodes_from(previous))
        previous = stage
    return node_lists


def _read_by_any(node_lists: Sequence[list[fx.Node]]) -> set[fx.Node]:
    read: set[fx.Node] = set()
    for nodes in node_lists:
        read.update(nodes_read_by(nodes))
    return read


def _module(
    net: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    """Return some nodes of the outer graph as a module.

    It takes the inputs. It returns the goodness, which is the last node, and then the outputs.
    """
    graph = fx.Graph()
    copy_of: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copy_of[node] = graph.create_node("placeholder", node.name, name=node.name)
    for node in nodes:
        copy_of[node] = graph.node_copy(node, copy_of.__getitem__)
    goodness = nodes[-1]
    returned = [goodness, *outputs]
    graph.output(tuple(copy_of[node] for node in returned))
    graph.lint()
    return fx.GraphModule(net, graph, class_name="Stage").eval()


def _name(node: fx.Node, net: fx.GraphModule) -> str:
    """Return the name of a value. An input may have one that no node can have."""
    for name, placeholder in placeholders_of(net).items():
        if placeholder is node:
            return name
    return node.name


def _form(value: Any) -> Any:
    """Return the shape of a tensor, a number itself, and the forms of the parts of a tuple."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return [_form(part) for part in value]
    return value if isinstance(value, (int, float)) else None
