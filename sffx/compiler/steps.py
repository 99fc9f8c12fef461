"""The steps of a model: what a policy may ask of the computation between two cut sets.

`dataflow` says what a step is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from sffx.compiler.cut_sets import Cut
from sffx.compiler.dataflow import Dataflow
from sffx.compiler.facts import facts
from sffx.compiler.joins import Joins
from sffx.compiler.layers import Layers, common_scope, scopes
from sffx.compiler.sample_order import is_out_of_order

# Beginnings of names of classes and functions, in small letters.
POOLS = ("adaptive",)
DROPOUT = ("dropout",)


@dataclass(frozen=True)
class Step:
    """The computation between one cut set of the spine and the next.

    Attributes:
        node: name of the node that ends it, the place of a possible cut. Of several values that
            cross the cut, it is the main one.
        values: names of all values that would cross a cut there, the main one last.
        nodes: names of all its nodes, in the order they run.
        scope: qualname of the deepest module that holds all its paths, "" for the model itself.
        join: how several paths meet in `node`, "sum", "cat", "product" (a gate, with no layer on
            one of the paths) or "other"; "" where there is one path.
        shape: of one sample's value, without the batch axis; () where the value is no tensor.
        crossing: how many numbers of the example would cross a cut there, of all its values.
        trainable: whether it has parameters.
        weighted: whether one of them is the weight matrix or kernel of a layer.
        batchnorm: whether a BN layer is in it.
        norm: whether a norm is in it, of any kind.
        keeps_shape: whether it has no layer with parameters and its value has the shape of its
            input, as an activation or a bias; dropout does not count.
        scales: whether its parameters are vectors and its value has the shape of its input, as in a
            norm, or an activation with parameters.
        narrows: whether it has no parameters and gives the value of the last layer with fewer
            channels, as GLU or maxout does.
        pools: whether it starts the way to the classifier. That is an adaptive pool behind a layer,
            or a flat value made from one that is not flat and behind a layer whose value is not.
        drops: whether it is dropout.
        refusal: why no cut may lie after it, "" where one may.
        parts_streams: whether it ends in a cut set that was looked for where streams run side by
            side. `node` may not dominate the logits, so that other values cross the cut, or streams
            from other inputs begin after it.
    """

    node: str
    values: tuple[str, ...]
    nodes: tuple[str, ...]
    scope: str
    join: str
    shape: tuple[int, ...]
    crossing: int
    trainable: bool
    weighted: bool
    batchnorm: bool
    norm: bool
    keeps_shape: bool
    scales: bool
    narrows: bool
    pools: bool
    drops: bool
    refusal: str
    parts_streams: bool = False

    @property
    def cut(self) -> Cut:
        """The cut after it."""
        return self.values if len(self.values) > 1 else self.node


class StepMaker:
    """Describes the steps between the cut sets of a spine.

    Args:
        flow: the dataflow of the model, which has the spine.
        layers: of the model.
        joins: of the model.
        channel_axes: the channel axis of each value that has one.
        given: the cut sets that are on the spine besides the dominators of the logits.
    """

    def __init__(
        self,
        flow: Dataflow,
        layers: Layers,
        joins: Joins,
        channel_axes: Mapping[str, int],
        given: Collection[frozenset[str]],
    ) -> None:
        self._flow = flow
        self._layers = layers
        self._joins = joins
        self._channel_axes = channel_axes
        self._given = given

    def steps(self, reasons: list[str]) -> tuple[Step, ...]:
        """Return the steps, in order; the last one computes the logits.

        Args:
            reasons: for each step, why no cut may lie after it, "" where one may.
        """
        steps: list[Step] = []
        layer = None  # the last step so far that has one
        for i, nodes in enumerate(self._nodes_of_steps()):
            step = self._step(i, nodes, reasons[i], layer)
            steps.append(step)
            if step.weighted:
                layer = step
        return tuple(steps)

    def _nodes_of_steps(self) -> list[list[Node]]:
        """Return the nodes of each step, in the order they run.

        A placeholder is in none, since the inputs of the model are at hand in every block.
        """
        members: list[list[Node]] = [[] for _ in self._flow.spine]
        for name, node in self._flow.nodes.items():
            if node.op != "placeholder":
                members[self._flow.step_of[name]].append(node)
        return members

    def _step(self, index: int, nodes: list[Node], refusal: str, layer: Step | None) -> Step:
        """Return a step.

        Args:
            index: of the step.
            nodes: in it.
            refusal: why no cut may lie after it.
            layer: the last step before it that has a layer, if there is one.
        """
        end = self._flow.nodes[self._flow.spine[index]]
        values = self._flow.cut_sets[index]
        value = facts(end).example
        before = self._node_before(index)
        value_before = None if before is None else facts(before).example
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        layers = self._layers
        trainable = any(layers.parameters(node) for node in nodes)
        paths = [node for node in nodes if self._flow.is_path(node.name)]
        is_given = frozenset(values) in self._given
        return Step(
            node=end.name,
            values=values,
            nodes=tuple(node.name for node in nodes),
            scope=common_scope([scopes(node) for node in paths]),
            join=self._joins.kind_in_step(end.name),
            shape=shape,
            crossing=self._numbers(values),
            trainable=trainable,
            weighted=any(layers.is_weighted(node) for node in nodes),
            batchnorm=any(layers.is_batch_norm(node) for node in nodes),
            norm=any(layers.is_norm(node) for node in nodes),
            keeps_shape=self._keeps_shape(nodes, end, before),
            scales=trainable and self._scales(nodes, end, before),
            narrows=not trainable and self._has_fewer_channels(value, layer),
            pools=self._starts_classifier(end, shape, value_before, layer),
            drops=layers.begins_with(end, DROPOUT),
            refusal=refusal,
            parts_streams=is_given or not self._flow.dominates(end.name),
        )

    def _has_fewer_channels(self, value: Any, layer: Step | None) -> bool:
        """Return whether a value is that of a layer with a part of its channels.

        Behind a convolution with (B, 64, H, W), maxout over pairs is one with (B, 32, H, W).
        """
        if layer is None or layer.node not in self._channel_axes:
            return False
        of_layer = facts(self._flow.nodes[layer.node]).example
        # A recurrent layer returns several tensors.
        if not isinstance(value, Tensor) or not isinstance(of_layer, Tensor):
            return False
        axis = self._channel_axes[layer.node]
        # With the batch axis: where a view folds channels into it, the value is no such part.
        other_axes_before = list(of_layer.shape)
        other_axes = list(value.shape)
        if len(other_axes) != len(other_axes_before):
            return False
        channels_before = other_axes_before.pop(axis)
        channels = other_axes.pop(axis)
        is_part = 1 < channels < channels_before and channels_before % channels == 0
        return is_part and other_axes == other_axes_before

    def _starts_classifier(
        self, end: Node, shape: tuple[int, ...], before: Any, layer: Step | None
    ) -> bool:
        """Return whether a step starts the way to the classifier, as `Step.pools` says.

        Args:
            end: the node that ends the step.
            shape: of one sample's value.
            before: the value that the step starts from.
            layer: the last step before it that has a layer, if there is one.
        """
        # What comes before all layers prepares the input, as by resizing or flattening it.
        if layer is None:
            return False
        if self._layers.begins_with(end, POOLS):
            return True
        # A perceptron with maxout, or one whose layers read a stack of values, is flat again.
        was_flat = not isinstance(before, Tensor) or before.ndim <= 2
        return len(shape) == 1 and not was_flat and len(layer.shape) != 1

    def _numbers(self, values: Iterable[str]) -> int:
        """Return how many numbers the tensors among some values hold."""
        count = 0
        for name in values:
            value = facts(self._flow.nodes[name]).example
            if isinstance(value, Tensor):
                count += value.numel()
        return count

    def _node_before(self, index: int) -> Node | None:
        """Return the node whose value a step starts from; None for the first step."""
        return None if index == 0 else self._flow.nodes[self._flow.spine[index - 1]]

    def _keeps_shape(self, nodes: list[Node], end: Node, before: Node | None) -> bool:
        """Return whether a step has no layer and leaves the shape, as `Step.keeps_shape` says.

        Args:
            nodes: in the step.
            end: the node that ends it.
            before: the node whose value it starts from; None for the first step.
        """
        if before is None or self._layers.begins_with(end, (*POOLS, *DROPOUT)):
            return False
        if is_out_of_order(facts(end).batch) or not _have_same_axes(before, end):
            return False
        for node in nodes:
            # A parameter that is read by its name may be a bias, which leaves the shape.
            is_module = node.op == "call_module"
            if self._layers.is_weighted(node) or (is_module and self._layers.parameters(node)):
                return False
        return True

    def _scales(self, nodes: list[Node], end: Node, before: Node | None) -> bool:
        """Return whether a step has no matrix and leaves the shape, as `Step.scales` says."""
        if before is None or is_out_of_order(facts(end).batch) or not _have_same_axes(before, end):
            return False
        if any(self._layers.is_weighted(node) for node in nodes):
            return False
        return all(self._layers.holds_vectors_alone(node) for node in nodes)


def _have_same_axes(one: Node, two: Node) -> bool:
    """Return whether two nodes compute tensors of one shape, with the batch on the same axis.

    Another axis may be as long as the batch of the example. At the other batch size it is not.
    """
    is_same = _have_same_shape(facts(one).example, facts(two).example)
    return is_same and _have_same_shape(facts(one).other, facts(two).other)


def _have_same_shape(value: Any, other: Any) -> bool:
    """Return whether two values are tensors of one shape."""
    are_tensors = isinstance(value, Tensor) and isinstance(other, Tensor)
    return are_tensors and value.shape == other.shape
