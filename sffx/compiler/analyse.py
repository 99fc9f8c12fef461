"""Analyse a traced model: the steps between its cut sets, and where a cut may lie.

`dataflow` says what a path, the spine and a step are. A policy chooses among the steps.

A cut is named by the node whose value crosses it. A cut across several values is named by a tuple
of nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import Tensor, nn
from torch.fx import Node

from sffx.compiler.channels import channel_axes
from sffx.compiler.cut_errors import listed, nothing_was_cut, refused
from sffx.compiler.cut_sets import PASSED_BY, Cut, complete, main_value, names_in
from sffx.compiler.dataflow import Dataflow
from sffx.compiler.facts import facts
from sffx.compiler.joins import Joins
from sffx.compiler.layers import Layers, scopes
from sffx.compiler.masks import Masks
from sffx.compiler.refusals import refusals, shared_state
from sffx.compiler.steps import DROPOUT, POOLS, Step, StepMaker
from sffx.compiler.streams import with_streams
from sffx.compiler.trace.trace import Trace
from sffx.errors import CutError


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
        self._joins = Joins(self._flow, self._layers)
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
        reasons = refusals(
            self._flow, self._layers, self._shared_by_step, self.channel_axes, self.trace.task
        )
        maker = StepMaker(self._flow, self._layers, self._joins, self.channel_axes, self._given)
        return maker.steps(reasons)

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
        return self._layers.begins_with(node, POOLS)

    def is_dropout(self, node: Node) -> bool:
        """Return whether a node is dropout."""
        return self._layers.begins_with(node, DROPOUT)

    def is_path(self, name: str) -> bool:
        """Return whether a block can learn from the value of a node."""
        return self._flow.is_path(name)

    def join(self, name: str) -> str:
        """Return how several paths meet in a node, "" where none do; see `Joins.kind`."""
        return self._joins.kind(name)

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
        """Return how many layers each path has that meets in a node; see `Joins`."""
        return self._joins.layers_on_paths(name)

    @property
    def flow(self) -> Dataflow:
        """The dataflow of the model."""
        return self._flow

    def with_cut_sets(self, cut_sets: Sequence[frozenset[str]]) -> Analysis:
        """Return an analysis of the same model that has these cut sets on its spine.

        Besides these, the dominators of the logits are on it, and no others. If all are on the
        spine already, it is this analysis.
        """
        if self._cut_sets_on_spine.issuperset(cut_sets):
            return self
        key = tuple(cut_sets)
        if key not in self._with_cut_sets:
            self._with_cut_sets[key] = Analysis(self.trace, cut_sets)
        return self._with_cut_sets[key]

    @cached_property
    def _cut_sets_on_spine(self) -> set[frozenset[str]]:
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
        chosen = tuple(dict.fromkeys(cuts))
        for cut in chosen:
            reason = self._refusal_of_names(cut)
            if reason:
                raise refused(cut, reason, str(main_value(cut)), self.candidates)
        if not chosen:
            raise nothing_was_cut(self.steps, self.candidates, self.trace)
        cut_sets = self._complete(chosen)
        # An analysis with these cut sets on its spine says whether a cut may lie there.
        analysis = self.with_cut_sets(cut_sets)
        required = []
        for step in analysis.steps:
            if frozenset(step.values) not in cut_sets:
                continue
            if step.refusal:
                raise refused(step.cut, step.refusal, step.node, self.candidates)
            required.append(step.cut)
        return tuple(required)

    def _complete(self, cuts: Sequence[Cut]) -> list[frozenset[str]]:
        """Return for each cut all values that cross it."""
        cut_sets = [frozenset(names_in(cut)) for cut in cuts]
        # Cut sets on the spine are whole already.
        if self._cut_sets_on_spine.issuperset(cut_sets):
            return cut_sets
        return complete(self._flow, cuts, f"The candidates are {listed(self.candidates)}")

    def _refusal_of_names(self, cut: Cut) -> str:
        """Return why a cut cannot have the names that it has, "" where it can."""
        for name in names_in(cut):
            if not isinstance(name, str) or name not in self.nodes:
                return "the traced graph has no node of this name"
            if not self._flow.leads_to_logits(name):
                return PASSED_BY
        return ""
