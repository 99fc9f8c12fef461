"""Analyse a traced model: the steps between its cut sets, and where a cut may lie.

`dataflow` says what a path, the spine and a step are. A policy chooses among the steps.

A cut is named by the node whose value crosses it. A cut across several values is named by a tuple
of nodes.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sffx.compiler.channels import channel_axes
from sffx.compiler.cut_sets import PASSED_BY, Cut, complete, in_words, main_value, names_in
from sffx.compiler.dataflow import SOURCE, Dataflow
from sffx.compiler.facts import facts
from sffx.compiler.layers import Layers, common_scope, scopes
from sffx.compiler.masks import Masks
from sffx.compiler.refusals import refusals, shared_state
from sffx.compiler.sample_order import is_out_of_order
from sffx.compiler.streams import with_streams
from sffx.compiler.trace.trace import Trace
from sffx.compiler.way_out import way_out
from sffx.errors import CutError

# Targets of nodes, by how they join paths. A string is the name of a method.
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub, "sub")
_CATS = (torch.cat, torch.concat, torch.concatenate)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
_JOINS: dict[Any, str] = {
    **dict.fromkeys(_SUMS, "sum"),
    **dict.fromkeys(_CATS, "cat"),
    **dict.fromkeys(_PRODUCTS, "product"),
}
# Beginnings of names of classes and functions, in small letters.
_POOLS = ("adaptive",)
_DROPOUT = ("dropout",)

MOST_CANDIDATES = 12  # that an error lists


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


def analyse(trace: Trace) -> Analysis:
    """Return the analysis of a traced model.

    Raises:
        CutError: its output depends on no parameter, or on no input.
    """
    return with_streams(Analysis(trace))


class Analysis:
    """Questions about a traced model and their answers. It changes nothing.

    Args:
        trace: the traced model.
        cut_sets: that are on the spine besides the dominators of the logits.

    Attributes:
        trace: the traced model.
        nodes: its nodes by name, in the order they run, without the output.
        logits: name of the node that computes the logits.
        graph: `networkx.DiGraph` of the dataflow. Keys are names of nodes, and each node has the
            attribute `path`.
        spine: the main values of the cut sets, in order; the last one is the logits.
        step_of: for each node, the index of its step.
    """

    def __init__(self, trace: Trace, cut_sets: Sequence[Iterable[str]] = ()) -> None:
        self.trace = trace
        self._layers = Layers(trace.root)
        self._flow = Dataflow(trace, self._layers, cut_sets)
        self._given = {frozenset(values) for values in cut_sets}
        # `require` and the plan ask for the same cut sets, and an analysis takes time.
        self._with_cut_sets: dict[Sequence[frozenset[str]], Analysis] = {}
        self.nodes = self._flow.nodes
        self.logits = self._flow.logits
        self.graph = self._flow.graph
        self.spine = self._flow.spine
        self.step_of = self._flow.step_of

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps, in order; the last one computes the logits."""
        members: list[list[Node]] = [[] for _ in self.spine]
        for name, node in self.nodes.items():
            if node.op != "placeholder":
                members[self.step_of[name]].append(node)
        # A placeholder is in no step, since the inputs of the model are at hand in every block.
        reasons = refusals(
            self._flow, self._layers, self._shared_by_step, self.channel_axes, self.trace.task
        )
        steps: list[Step] = []
        layer = None  # the last step so far that has one
        for i, nodes in enumerate(members):
            step = self._step(i, nodes, reasons[i], layer)
            steps.append(step)
            if step.weighted:
                layer = step
        return tuple(steps)

    @cached_property
    def candidates(self) -> tuple[Cut, ...]:
        """The cuts that can be made, in order: names of nodes, or tuples of names."""
        return tuple(step.cut for step in self.steps if not step.refusal)

    @cached_property
    def channel_axes(self) -> dict[str, int]:
        """The channel axis of the value of each node that has one."""
        return channel_axes(self.trace)

    @cached_property
    def masks(self) -> Masks:
        """The attention masks of the model."""
        return Masks(self._flow, self.trace.inputs, self.channel_axes)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the parameters and modules with a state that are used in several places.

        No cut can lie between their uses.
        """
        names = dict.fromkeys(self._shared_by_step)
        return tuple(name for name in names if name)

    @cached_property
    def _shared_by_step(self) -> list[str]:
        return shared_state(self._flow, self._layers)

    def macs(self, step: Step) -> int:
        """Return the multiply-adds of a step for one sample."""
        macs = 0
        for name in step.nodes:
            macs += facts(self.nodes[name]).cost.macs
        return int(macs // self.trace.batch_size)

    def module(self, node: Node) -> nn.Module | None:
        """Return the module that a node calls, None for another kind of node."""
        return self._layers.module(node)

    def kind(self, qualname: str) -> type[nn.Module]:
        """Return the class of a module by its qualname."""
        return type(self.trace.root.get_submodule(qualname))

    def parameters(self, node: Node) -> dict[str, nn.Parameter]:
        """Return the parameters that a node holds, by their qualname in the model."""
        return self._layers.parameters(node)

    def state(self, node: Node) -> dict[str, Tensor]:
        """Return the parameters of a node and the buffers of its module, by qualname."""
        return self._layers.state(node)

    def is_weighted(self, node: Node) -> bool:
        """Return whether a node is a layer with a weight matrix or a kernel."""
        return self._layers.is_weighted(node)

    def is_adaptive_pool(self, node: Node) -> bool:
        """Return whether a node is a pool to a given size."""
        return self._layers.begins_with(node, _POOLS)

    def is_dropout(self, node: Node) -> bool:
        """Return whether a node is dropout."""
        return self._layers.begins_with(node, _DROPOUT)

    def is_path(self, name: str) -> bool:
        """Return whether a block can learn from the value of a node."""
        return self._flow.is_path(name)

    def join(self, name: str) -> str:
        """Return how several paths that left one node meet in another.

        It is "sum", "cat", "product" or "other"; "" where none meet. Paths that start at several
        inputs never parted, so they are no join. Paths that part at one input are.
        """
        if not self.is_path(name) or self._flow.paths.in_degree(name) < 2:
            return ""
        # No node on a path lies before all of them. So they start at inputs.
        start_at_inputs = self._flow.dominator[name] == SOURCE
        if start_at_inputs and not self._flow.share_an_input(name):
            return ""
        return _JOINS.get(self.nodes[name].target, "other")

    def modules_with_sum(self, names: Iterable[str]) -> set[str]:
        """Return the qualnames of the modules whose own forward adds paths in one of some nodes.

        Residual blocks are such modules. The model itself does not count.
        """
        owners: set[str] = set()
        for name in names:
            around = scopes(self.nodes[name])
            if around and self.join(name) == "sum":
                owners.add(around[-1])
        return owners

    def layers_on_paths(self, name: str) -> tuple[int, ...]:
        """Return, for each path that meets in a join, its layers with parameters since they parted.

        At the sum of a residual block with two convolutions these are (2, 0). The paths are in the
        order of the arguments. Behind them are those that are in no argument: an in-place write
        asks for their order.
        """
        paths = self._flow.paths
        arguments = [arg.name for arg in self.nodes[name].all_input_nodes]
        arguments_on_paths = [arg for arg in arguments if paths.has_edge(arg, name)]
        ends = dict.fromkeys([*arguments_on_paths, *paths.predecessors(name)])
        start = self._flow.dominator[name]
        counts = []
        for end in ends:
            passed = self._flow.between(start, end)
            layers = [each for each in passed if self._is_layer(self.nodes[each])]
            counts.append(len(layers))
        return tuple(counts)

    @property
    def flow(self) -> Dataflow:
        """The dataflow of the model."""
        return self._flow

    def with_cut_sets(self, cut_sets: Sequence[frozenset[str]]) -> Analysis:
        """Return an analysis of the same model that has these cut sets on its spine.

        Besides these, the dominators of the logits are on it, and no others. If all are on the
        spine already, it is this analysis.
        """
        if self._spine_has.issuperset(cut_sets):
            return self
        key = tuple(cut_sets)
        if key not in self._with_cut_sets:
            self._with_cut_sets[key] = Analysis(self.trace, cut_sets)
        return self._with_cut_sets[key]

    @cached_property
    def _spine_has(self) -> set[frozenset[str]]:
        return {frozenset(values) for values in self._flow.cut_sets}

    def across(self, cuts: Iterable[Cut]) -> Analysis:
        """Return an analysis of the same model in which a step ends at each of the cuts.

        Args:
            cuts: each with all values that cross it, as `require` returns them.
        """
        return self.with_cut_sets([frozenset(names_in(cut)) for cut in cuts])

    def require(self, cuts: Iterable[Cut]) -> tuple[Cut, ...]:
        """Return cuts in the order of the model, each once, with all values that cross them.

        Raises:
            CutError: a name is no node, no cut can lie there, with the reason, or there is none.
        """
        if not any(p.requires_grad for p in self.trace.root.parameters()):
            raise CutError(
                "the model has no trainable parameters, so there is nothing to train. "
                "Hint: set requires_grad before transforming"
            )
        chosen = dict.fromkeys(cuts)
        for cut in chosen:
            reason = self._refusal_of_names(cut)
            if reason:
                raise self._refused(cut, reason, str(main_value(cut)))
        if not chosen:
            raise CutError(self._why_nothing_was_cut())
        cut_sets = [frozenset(names_in(cut)) for cut in chosen]
        # Cut sets on the spine are whole already.
        if not self._spine_has.issuperset(cut_sets):
            hint = f"The candidates are {_listed(self.candidates)}"
            cut_sets = complete(self._flow, chosen, hint)
        # An analysis with these cut sets on its spine says whether a cut may lie there.
        analysis = self.with_cut_sets(cut_sets)
        required = []
        for step in analysis.steps:
            if frozenset(step.values) not in cut_sets:
                continue
            if step.refusal:
                raise self._refused(step.cut, step.refusal, step.node)
            required.append(step.cut)
        return tuple(required)

    def _refused(self, cut: Cut, reason: str, name: str) -> CutError:
        """Return the error for a cut, with the candidates whose names resemble a name."""
        hint = _candidate_hint(name, self.candidates)
        return CutError(f"no cut can lie {in_words(cut)}: {reason}. Hint: {hint}")

    def _why_nothing_was_cut(self) -> str:
        if self.candidates:
            return (
                "the policy found no block besides the classifier. Hint: choose another policy, "
                f"or pass a list of node names; the candidates are {_listed(self.candidates)}"
            )
        first_reasons = [f"{step.node}: {step.refusal}" for step in self.steps[:4]]
        reasons = "; ".join(first_reasons)
        return (
            "the model has no node to cut at, since no value lies on every path from input to "
            f"logits and may be cut ({reasons}). "
            + way_out(self.trace, [step.refusal for step in self.steps])
        )

    def _refusal_of_names(self, cut: Cut) -> str:
        """Return why a cut cannot have the names that it has, "" where it can."""
        for name in names_in(cut):
            if not isinstance(name, str) or name not in self.nodes:
                return "the traced graph has no node of this name"
            if not self._flow.leads_to_logits(name):
                return PASSED_BY
        return ""

    def _step(self, index: int, nodes: list[Node], refusal: str, layer: Step | None) -> Step:
        """Return a step.

        Args:
            index: of the step.
            nodes: in it.
            refusal: why no cut may lie after it.
            layer: the last step before it that has a layer, if there is one.
        """
        end = self.nodes[self.spine[index]]
        values = self._flow.cut_sets[index]
        value = facts(end).example
        before = self._node_before(index)
        value_before = None if before is None else facts(before).example
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        trainable = any(self.parameters(node) for node in nodes)
        paths = [node for node in nodes if self.is_path(node.name)]
        return Step(
            node=end.name,
            values=values,
            nodes=tuple(node.name for node in nodes),
            scope=common_scope([scopes(node) for node in paths]),
            join=self._join_of_step(end.name),
            shape=shape,
            crossing=self._numbers(values),
            trainable=trainable,
            weighted=any(self._layers.is_weighted(node) for node in nodes),
            batchnorm=any(self._layers.is_batch_norm(node) for node in nodes),
            norm=any(self._layers.is_norm(node) for node in nodes),
            keeps_shape=self._keeps_shape(nodes, end, before),
            scales=trainable and self._scales(nodes, end, before),
            narrows=not trainable and self._has_fewer_channels(value, layer),
            pools=self._starts_classifier(end, shape, value_before, layer),
            drops=self._layers.begins_with(end, _DROPOUT),
            refusal=refusal,
            parts_streams=frozenset(values) in self._given or not self._flow.dominates(end.name),
        )

    def _has_fewer_channels(self, value: Any, layer: Step | None) -> bool:
        """Return whether a value is that of a layer with a part of its channels.

        Behind a convolution with (B, 64, H, W), maxout over pairs is one with (B, 32, H, W).
        """
        if layer is None or layer.node not in self.channel_axes:
            return False
        of_layer = facts(self.nodes[layer.node]).example
        # A recurrent layer returns several tensors.
        if not isinstance(value, Tensor) or not isinstance(of_layer, Tensor):
            return False
        axis = self.channel_axes[layer.node]
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
        if self._layers.begins_with(end, _POOLS):
            return True
        # A perceptron with maxout, or one whose layers read a stack of values, is flat again.
        was_flat = not isinstance(before, Tensor) or before.ndim <= 2
        return len(shape) == 1 and not was_flat and len(layer.shape) != 1

    def _join_of_step(self, name: str) -> str:
        """Return how the paths of a step meet; a product with a layer on each path is no gate."""
        join = self.join(name)
        if join == "product" and min(self.layers_on_paths(name), default=0) > 0:
            return "other"
        return join

    def _numbers(self, values: Iterable[str]) -> int:
        """Return how many numbers the tensors among some values hold."""
        count = 0
        for name in values:
            value = facts(self.nodes[name]).example
            if isinstance(value, Tensor):
                count += value.numel()
        return count

    def _node_before(self, index: int) -> Node | None:
        """Return the node whose value a step starts from; None for the first step."""
        return None if index == 0 else self.nodes[self.spine[index - 1]]

    def _keeps_shape(self, nodes: list[Node], end: Node, before: Node | None) -> bool:
        """Return whether a step has no layer and leaves the shape, as `Step.keeps_shape` says.

        Args:
            nodes: in the step.
            end: the node that ends it.
            before: the node whose value it starts from; None for the first step.
        """
        if before is None or self._layers.begins_with(end, (*_POOLS, *_DROPOUT)):
            return False
        if is_out_of_order(facts(end).batch) or not _have_same_axes(before, end):
            return False
        for node in nodes:
            # A parameter that is read by its name may be a bias, which leaves the shape.
            is_module = node.op == "call_module"
            if self._layers.is_weighted(node) or (is_module and self.parameters(node)):
                return False
        return True

    def _scales(self, nodes: list[Node], end: Node, before: Node | None) -> bool:
        """Return whether a step has no matrix and leaves the shape, as `Step.scales` says."""
        if before is None or is_out_of_order(facts(end).batch) or not _have_same_axes(before, end):
            return False
        if any(self._layers.is_weighted(node) for node in nodes):
            return False
        return all(self._layers.holds_vectors_alone(node) for node in nodes)

    def _is_layer(self, node: Node) -> bool:
        return bool(self.parameters(node)) or self._layers.is_weighted(node)


def _have_same_axes(one: Node, two: Node) -> bool:
    """Return whether two nodes compute tensors of one shape, with the batch on the same axis.

    Another axis may be as long as the batch of the example. At the other batch size it is not.
    """
    for value, other in (
        (facts(one).example, facts(two).example),
        (facts(one).other, facts(two).other),
    ):
        if not isinstance(value, Tensor) or not isinstance(other, Tensor):
            return False
        if value.shape != other.shape:
            return False
    return True


def _candidate_hint(name: str, candidates: Sequence[Cut]) -> str:
    """Return a hint that lists the candidates, first those whose names resemble a name."""
    if not candidates:
        return "the model has no candidates"
    main_values = [main_value(cut) for cut in candidates]
    near = difflib.get_close_matches(name, main_values, n=3, cutoff=0.6)
    similar = [candidates[main_values.index(each)] for each in near]
    alternatives = " or ".join(repr(cut) for cut in similar)
    meant = f"did you mean {alternatives}? " if near else ""
    return f"{meant}The candidates are {_listed(candidates)}"


def _listed(candidates: Sequence[Cut]) -> str:
    written = [_written(cut) for cut in candidates]
    if len(written) > MOST_CANDIDATES:
        shown = MOST_CANDIDATES - 1
        written = [*written[:shown], f"… {len(candidates) - shown} more"]
    return ", ".join(written)


def _written(cut: Cut) -> str:
    """Return a cut as an error lists it."""
    return cut if isinstance(cut, str) else str(cut)
