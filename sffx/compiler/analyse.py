"""Analyse a traced model as a dataflow graph: its spine of dominators, the steps between them, and where a cut may lie.

A *path* carries what a block learns from: float or complex tensors that depend, through tensor edges, on an input and on a parameter.
Sizes, masks, positions and values computed from parameters alone are no paths; they cross a cut as side values. The *spine* is the list of
nodes that every path from the inputs to the logits passes through (the dominators of the output), and a *step* is what is computed between
one node of the spine and the next. A policy chooses among the steps.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.compiler.channels import channel_axes
from sffx.compiler.examples import TRACE_BATCH
from sffx.compiler.facts import facts
from sffx.compiler.qualnames import parameters_of
from sffx.compiler.trace.trace import Trace
from sffx.errors import CutError, InputError
from sffx.tensors import can_learn

_SOURCE = "«inputs»"  # the virtual node that all paths start from; no fx node can be called so

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub, "sub")
_CATS = (torch.cat, torch.concat, torch.concatenate)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_")
_JOINS: dict[Any, str] = {
    **dict.fromkeys(_SUMS, "sum"),
    **dict.fromkeys(_CATS, "cat"),
    **dict.fromkeys(_PRODUCTS, "product"),
}
_WEIGHTED_FUNCTIONS = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.embedding, F.bilinear),
    *(torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, torch.einsum, operator.matmul, "matmul"),
)
_BREAKS = ("adaptive", "dropout")


@dataclass(frozen=True)
class Step:
    """What is computed between one node of the spine and the next.

    Attributes:
        node: name of the spine node that ends it, the place of a possible cut.
        nodes: names of all its nodes, in the order they run.
        scope: qualname of the deepest module that holds all its paths, "" for the model itself; a mask may be made anywhere.
        scopes: qualnames of all modules that hold the node that ends it, outermost first.
        join: "sum", "cat" or "product" where several paths meet in `node`, "other" where they meet otherwise, "" where there is one path.
        shape: of one sample's value, without the batch axis; () where the value is no tensor.
        trainable: whether it has parameters.
        weighted: whether one of them is the weight matrix or kernel of a layer.
        batchnorm: whether a BN layer is in it.
        keeps_shape: whether it has no layer with parameters and its value has the shape of its input, as an activation or a bias; dropout
            does not count.
        pools: whether it starts the way to the classifier: an adaptive pool, or a flat value made from one that is not.
        drops: whether it is dropout.
        refusal: why no cut may lie after it, "" where one may.
    """

    node: str
    nodes: tuple[str, ...]
    scope: str
    scopes: tuple[str, ...]
    join: str
    shape: tuple[int, ...]
    trainable: bool
    weighted: bool
    batchnorm: bool
    keeps_shape: bool
    pools: bool
    drops: bool
    refusal: str


class Analysis:
    """Questions about a traced model and their answers; mutates nothing.

    Attributes:
        trace: what is analysed.
        graph: `networkx.DiGraph` of the dataflow. Keys are fx node names, and each node has the attribute `path`.
        spine: names of the dominators of the logits, in order; the last one is the logits.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = {node.name: node for node in trace.graph.nodes if node.op != "output"}
        self.logits: str = next(iter(reversed(trace.graph.nodes))).args[0].name
        self.graph = _dataflow(self.nodes, trace.root)
        self.spine = self._spine()
        self.step_of = self._place()

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps, in order; the last one computes the logits."""
        members: list[list[fx.Node]] = [[] for _ in self.spine]
        for name, node in self.nodes.items():
            if node.op != "placeholder":
                members[self.step_of[name]].append(node)
        refusals = self._refusals()
        return tuple(self._step(i, nodes, refusals[i]) for i, nodes in enumerate(members))

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the nodes after which a cut may lie, in order."""
        return tuple(step.node for step in self.steps if not step.refusal)

    @cached_property
    def channel_axes(self) -> dict[str, int]:
        """The channel axis of the value of each node that has one."""
        return channel_axes(self.trace)

    def macs(self, step: Step) -> int:
        """Return the multiply-adds of a step for one sample."""
        return int(sum(facts(self.nodes[name]).cost.macs for name in step.nodes) // TRACE_BATCH)

    def kind(self, qualname: str) -> type[nn.Module]:
        """Return the class of a module by its qualname."""
        return type(self.trace.root.get_submodule(qualname))

    def require(self, names: Iterable[str]) -> tuple[str, ...]:
        """Check that a cut may lie after each of the named nodes and return them in the order of the spine, each once.

        Raises:
            CutError: a name is no node or no candidate, with the reason, or there is none.
        """
        if not any(p.requires_grad for p in self.trace.root.parameters()):
            raise CutError(
                "the model has no trainable parameters, so there is nothing to train. Hint: set requires_grad before transforming"
            )
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InputError(
                f"the policy returned a {type(names).__name__}. Hint: return the names of the nodes to cut after, as a list"
            )
        chosen = set(names)
        for name in chosen:
            refusal = self._refusal(name)
            if refusal:
                raise CutError(
                    f"no cut can lie after node {name!r}: {refusal}. Hint: {_candidate_hint(name, self.candidates)}"
                )
        if not chosen:
            raise CutError(self.barren())
        return tuple(name for name in self.candidates if name in chosen)

    @property
    def shared(self) -> tuple[str, ...]:
        """What is used in several places, between which no cut can lie: names of parameters or of modules with a state."""
        return tuple(dict.fromkeys(name for name in self._shared[:-1] if name))

    def barren(self) -> str:
        """Say why nothing was cut, for an error."""
        if not self.candidates:
            reasons = "; ".join(f"{step.node}: {step.refusal}" for step in self.steps[:4])
            return f"the model has no node to cut at, since no value lies on every path from input to logits and may be cut ({reasons})"
        return (
            "the policy found no block besides the classifier. Hint: choose another policy, or pass a list of node names; "
            f"the candidates are {', '.join(self.candidates[:8])}"
        )

    def _refusal(self, name: str) -> str:
        if not isinstance(name, str) or name not in self.nodes:
            return "the traced graph has no node of this name"
        if not self._is_on_spine(name):
            return "it does not dominate the output: some path from input to logits passes it by"
        return self.steps[self.step_of[name]].refusal

    def _is_on_spine(self, name: str) -> bool:
        return self.spine[self.step_of[name]] == name

    def _spine(self) -> list[str]:
        paths = nx.DiGraph(self.graph.edges)
        paths.add_nodes_from(self.graph)
        paths.remove_nodes_from(
            [name for name, is_path in self.graph.nodes(data="path") if not is_path]
        )
        entries = [name for name, degree in paths.in_degree if degree == 0]
        paths.add_edges_from((_SOURCE, name) for name in entries)
        if self.logits not in paths:
            raise CutError(
                "the model's output does not depend on a parameter and an input, so there is nothing to train"
            )
        dominator = nx.immediate_dominators(paths, _SOURCE)
        spine = [self.logits]
        while dominator[spine[-1]] not in (_SOURCE, None):
            spine.append(dominator[spine[-1]])
        self._paths, self._dominator = paths, dominator
        return spine[::-1]

    def _place(self) -> dict[str, int]:
        """Assign each node to a step: the first one that needs its value, but what reads a path stays with what it reads.

        A size may be read in the step after, where the value is at hand as well; a tensor may not, since what crosses a cut is normalised.
        """
        place = {name: i for i, name in enumerate(self.spine)}
        for name in reversed(self.nodes):
            readers = [place[user] for user in self.graph.successors(name) if user in place]
            if name not in place and readers:
                place[name] = min(readers)
        for name, node in self.nodes.items():
            if name not in self._paths:
                place[name] = self._place_beside(node, place)
        for name in reversed(
            self.nodes
        ):  # what a node reads is there before it, wherever the node went
            if name not in self._paths:
                place[name] = min(
                    [place[name], *(place[reader] for reader in self.graph.successors(name))]
                )
        return place

    def _place_beside(self, node: fx.Node, place: dict[str, int]) -> int:
        """Return the step of a node that is no path, from the steps of what it reads and, unless nothing reads it, from `place`."""
        sources = list(self.graph.predecessors(node.name))
        paths = [place[source] for source in sources if source in self._paths]
        if paths and _holds_tensor(facts(node).example):
            return max(paths)
        earliest = max(
            [place[source] for source in sources] + [step + 1 for step in paths], default=0
        )
        wanted = place.get(node.name, earliest)  # nothing reads an assertion
        return (
            min(wanted, earliest, len(self.spine) - 1)
            if paths or node.name not in place
            else wanted
        )

    def _step(self, index: int, nodes: list[fx.Node], refusal: str) -> Step:
        end = self.nodes[self.spine[index]]
        before = facts(self.nodes[self.spine[index - 1]]).example if index else None
        value = facts(end).example
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        parameters = {name for node in nodes for name in self.parameters(node)}
        return Step(
            node=end.name,
            nodes=tuple(node.name for node in nodes),
            scope=common_scope([scopes(node) for node in nodes if node.name in self._paths]),
            scopes=scopes(end),
            join=self.join(end.name) if index else "",
            shape=shape,
            trainable=bool(parameters),
            weighted=any(self._is_weighted(node) for node in nodes),
            batchnorm=any(self._is_batch_norm(node) for node in nodes),
            keeps_shape=self._keeps_shape(nodes, end, before),
            pools=self._is(end, ("adaptive",))
            or (len(shape) == 1 and isinstance(before, Tensor) and before.ndim > 2),
            drops=self._is(end, ("dropout",)),
            refusal=refusal,
        )

    def _keeps_shape(self, nodes: list[fx.Node], end: fx.Node, before: Any) -> bool:
        has_layer = any(
            self._is_weighted(node) or (node.op == "call_module" and self.parameters(node))
            for node in nodes
        )
        value = facts(end).example
        same = (
            isinstance(before, Tensor) and isinstance(value, Tensor) and before.shape == value.shape
        )
        return same and not has_layer and not self._is(end, _BREAKS)

    def join(self, name: str) -> str:
        """Name how several paths that left one node meet in another: "sum", "cat", "product" or "other"; "" where they do not.

        Paths that start at several inputs are no join.
        """
        if (
            not self.is_path(name)
            or self._paths.in_degree(name) < 2
            or self._dominator[name] == _SOURCE
        ):
            return ""
        return _JOINS.get(self.nodes[name].target, "other")

    def is_path(self, name: str) -> bool:
        """Whether a node's value is a float or complex tensor that depends on an input and on a parameter."""
        return bool(self.graph.nodes[name]["path"])

    def layers_on_paths(self, name: str) -> tuple[int, ...]:
        """Return, for each path that meets in a join, how many layers with parameters it has gone through since they parted.

        They are in the order of the arguments; an order that an in-place write asks for comes after them.
        """
        arguments = dict.fromkeys(arg.name for arg in self.nodes[name].all_input_nodes)
        ends = dict.fromkeys((*arguments, *self._paths.predecessors(name)))
        return tuple(
            self._layers_between(self._dominator[name], end)
            for end in ends
            if self._paths.has_edge(end, name)
        )

    def _layers_between(self, start: str, end: str) -> int:
        seen, ahead = {start}, [end]
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += self._paths.predecessors(name)
        return sum(
            1
            for name in seen - {start}
            if self.parameters(self.nodes[name]) or self._is_weighted(self.nodes[name])
        )

    def _refusals(self) -> list[str]:
        shared, norms = self._shared, self._batch_norms_after()
        last_weight = max(
            (self.step_of[name] for name, node in self.nodes.items() if self.parameters(node)),
            default=-1,
        )
        return [
            self._refuse(i, shared[i], norms[name], last_weight)
            for i, name in enumerate(self.spine)
        ]

    def _refuse(self, index: int, shared: str, norm: str, last_weight: int) -> str:
        name = self.spine[index]
        value = facts(self.nodes[name]).example
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return "its value is no float tensor"
        if value.ndim < 2 or value.shape[0] != TRACE_BATCH:
            return f"the first axis of its value is not the batch, shape {tuple(value.shape)} for a batch of {TRACE_BATCH}"
        if index >= last_weight:
            return "nothing after it has a parameter, so that no classifier would be left"
        if shared:
            return f"{shared} is used on both sides of it"
        if norm:
            return f"it would part the BN layer {norm} from the layer that feeds it"
        if name not in self.channel_axes:
            return f"the channel axis of its value, of shape {tuple(value.shape)}, cannot be told"
        return ""

    def _batch_norms_after(self) -> dict[str, str]:
        """Return the BN layer that each value of the spine feeds, through nothing but single activations or dropout, "" for none.

        A layer's own output may feed it beside a shortcut; the sum that opens a pre-activation block may not, or no cut could lie there.
        """
        found: dict[str, str] = {}
        for name in reversed(self.spine):  # what a value goes through is known before it
            found[name] = self._batch_norm_after(name, found)
        return found

    def _batch_norm_after(self, name: str, found: dict[str, str]) -> str:
        readers = [self.nodes[reader] for reader in self._paths.successors(name)]
        norms = [reader for reader in readers if self._is_batch_norm(reader)]
        if norms and (len(readers) == 1 or self._is_weighted(self.nodes[name])):
            return str(norms[0].target)
        if (
            len(readers) == 1
            and not self.parameters(readers[0])
            and self._is_on_spine(readers[0].name)
            and self._same_shape(name, readers[0].name)
        ):
            return found[readers[0].name]
        return ""

    def _is_batch_norm(self, node: fx.Node) -> bool:
        module = self._module(node)
        return node.target is F.batch_norm or (
            module is not None and "BatchNorm" in "".join(k.__name__ for k in type(module).__mro__)
        )

    def _same_shape(self, one: str, other: str) -> bool:
        return getattr(facts(self.nodes[one]).example, "shape", 1) == getattr(
            facts(self.nodes[other]).example, "shape", 2
        )

    @cached_property
    def _shared(self) -> list[str]:
        """Return for each step the name of a parameter or stateful module that is used both up to it and after it, "" for none."""
        span: dict[int, list[int]] = {}
        names: dict[int, str] = {}
        for name, node in self.nodes.items():
            for state, tensor in self._changed(node).items():
                names.setdefault(id(tensor), node.target if node.op == "call_module" else state)
                readers = (
                    [self.step_of[user] for user in self.graph.successors(name)]
                    if node.op == "get_attr"
                    else [self.step_of[name]]
                )
                span.setdefault(id(tensor), []).extend(readers)
        shared = [""] * len(self.spine)
        for key, used in span.items():
            if used:
                shared[min(used) : max(used)] = [names[key]] * (max(used) - min(used))
        return shared

    def _changed(self, node: fx.Node) -> dict[str, Tensor]:
        """Return parameters that the node uses and buffers that its module writes, by qualname; others may be shared."""
        changed = {
            *self.parameters(node),
            *(f"{node.target}.{name}" for name in facts(node).buffers),
        }
        return {name: tensor for name, tensor in self.state(node).items() if name in changed}

    def state(self, node: fx.Node) -> dict[str, Tensor]:
        """Return parameters that the node uses and buffers that its module may write to, by qualname."""
        module = self._module(node)
        buffers = (
            {f"{node.target}.{name}": b for name, b in module.named_buffers()}
            if module is not None
            else {}
        )
        return {**self.parameters(node), **buffers}

    def parameters(self, node: fx.Node) -> dict[str, nn.Parameter]:
        """Return the parameters that a node holds, by their qualname in the model."""
        return (
            parameters_of(self.trace.root, str(node.target))
            if node.op in ("call_module", "get_attr")
            else {}
        )

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.trace.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is(self, node: fx.Node, prefixes: tuple[str, ...]) -> bool:
        """Whether the class or function of a node has a name that begins with one of these."""
        module = self._module(node)
        name = (
            type(module).__name__
            if module is not None
            else getattr(node.target, "__name__", str(node.target))
        )
        return name.lower().startswith(prefixes)

    def _is_weighted(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(p.ndim > 1 for p in self.parameters(node).values())
        reads_matrix = any(
            p.ndim > 1 for arg in node.all_input_nodes for p in self.parameters(arg).values()
        )
        return node.target in _WEIGHTED_FUNCTIONS and reads_matrix


def analyse(trace: Trace) -> Analysis:
    """Analyse a traced model.

    Raises:
        CutError: its output depends on no parameter, or on no input.
    """
    return Analysis(trace)


def scopes(node: fx.Node) -> tuple[str, ...]:
    """Return the qualnames of the modules in whose forward the node was created, outermost first."""
    return tuple(path for path, _ in node.meta.get("nn_module_stack", {}).values())


def common_scope(stacks: list[tuple[str, ...]]) -> str:
    """Return the deepest module that all stacks have in common, "" for the model itself."""
    common = ""
    for level in zip(*stacks, strict=False):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common


def _dataflow(nodes: dict[str, fx.Node], root: nn.Module) -> nx.DiGraph:
    """Build the dataflow graph; an edge is an argument, or an order that an in-place write asks for."""
    graph = nx.DiGraph()
    depends: dict[str, tuple[bool, bool]] = {}
    for name, node in nodes.items():
        sources = [arg.name for arg in (*node.all_input_nodes, *facts(node).after)]
        depends[name] = _dependence(node, root, [depends[source] for source in sources])
        graph.add_node(
            name, path=all(depends[name]) and any(map(can_learn, _tensors(facts(node).example)))
        )
        graph.add_edges_from((source, name) for source in sources)
    return graph


def _dependence(
    node: fx.Node, root: nn.Module, sources: list[tuple[bool, bool]]
) -> tuple[bool, bool]:
    """Say whether a node's value depends, through tensors, on an input and on a parameter."""
    if not _holds_tensor(facts(node).example):
        return False, False
    if node.op == "placeholder":
        return True, False
    own = parameters_of(root, str(node.target)) if node.op in ("call_module", "get_attr") else {}
    if not own and _stops_gradient(node):
        return False, False
    return any(on_input for on_input, _ in sources), bool(own) or any(
        on_parameter for _, on_parameter in sources
    )


def _stops_gradient(node: fx.Node) -> bool:
    """Whether a module's value has no gradient though its input has: rotary positions, which look at their input's dtype alone."""
    inputs = [tensor for arg in node.all_input_nodes for tensor in _tensors(facts(arg).example)]
    reads, gives = (
        any(tensor.requires_grad for tensor in tensors)
        for tensors in (inputs, _tensors(facts(node).example))
    )
    return node.op == "call_module" and reads and not gives


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _holds_tensor(value: Any) -> bool:
    return any(True for _ in _tensors(value))


def _candidate_hint(name: str, candidates: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), candidates, n=3, cutoff=0.6)
    listed = (
        candidates
        if len(candidates) <= 12
        else (*candidates[:11], f"… {len(candidates) - 11} more")
    )
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"{meant}The candidates are {', '.join(listed)}"
        if listed
        else "the model has no candidates"
    )
