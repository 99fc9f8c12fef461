"""One graph for both modes: merge what was traced in train mode with what was traced in eval mode.

A branch on `self.training` cannot be a node. Where a forward branches, the model is traced in both
modes, and the graphs are laid side by side.

- Both may have a node, but with another number or another value among its arguments, as the dropout
  of `p if self.training else 0.0`. Such an argument becomes a choice by the training flag.
- A node that only one of them has runs in this mode only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sffx.compiler.facts import Cost, Facts, facts, module_stack, set_facts, storages_written
from sffx.compiler.trace.align import Alignment, Region, align
from sffx.compiler.trace.effects import order_writes
from sffx.compiler.trace.flags import flag_target, is_flag
from sffx.compiler.trace.randomness import draw_where, is_draw, settled_draws
from sffx.compiler.trace.run_function import let_run_in_mode, pick
from sffx.compiler.trace.sizes import is_guard, is_guard_of_batch, without_batch_guards
from sffx.tensors import storage_key

# Which modules branch on whose modes: the qualnames of the modules whose modes decide, by the
# qualname of the module whose forward branches.
Branched = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class _Choice:
    """A value among a node's arguments that depends on a mode.

    Attributes:
        place: among the flattened arguments of the node.
        owner: qualname of the module whose mode it depends on.
        values: in (eval, train) mode: numbers, or nodes of the two graphs.
    """

    place: int
    owner: str
    values: tuple[Any, Any]


def merge_modes(
    graph: fx.Graph, eval_graph: fx.Graph, branched: Branched, probe: nn.Module
) -> bool:
    """Make a graph that was traced in train mode hold for eval mode as well, if that is possible.

    Args:
        graph: traced in train mode; to change.
        eval_graph: of the same model, traced in eval mode.
        branched: which modules branch on whose modes.
        probe: the model, which owns the constants of both graphs.

    Returns:
        Whether it was possible; if not, the graph is as it was.
    """
    guards = _batch_guards(graph)
    guards_in_eval = _batch_guards(eval_graph)
    if not guards_in_eval.keys() <= guards.keys():
        return False
    compared = list(graph.nodes)
    compared_in_eval = list(eval_graph.nodes)
    if guards:
        # A forward may look at the batch in one mode only: `self.training and x.shape[0] == 1`.
        compared = without_batch_guards(graph)
        compared_in_eval = without_batch_guards(eval_graph)
    # A forward may draw in train mode only: `self.training and torch.rand(1) < self.rate`.
    draws_in_training = [] if settled_draws(eval_graph) else settled_draws(graph)
    compared = [node for node in compared if node not in draws_in_training]
    merge = _possible_merge(compared, compared_in_eval, branched, probe)
    if merge is None:
        return False
    merge.run()
    for key in guards.keys() - guards_in_eval.keys():
        for guard in guards[key]:
            _guard_in_training(guard, branched, probe)
    # From the last on, since a node is erased only when nothing reads it.
    for node in reversed(draws_in_training):
        _draw_in_training(node, branched, probe)
    order_writes(graph, merge.chosen)
    return True


def _possible_merge(
    in_train: list[fx.Node], in_eval: list[fx.Node], branched: Branched, probe: nn.Module
) -> _Merge | None:
    """Return how two graphs can be merged, None if they cannot."""
    # From behind as well: from the front, an update of train mode may be taken for the later use.
    for from_behind in (False, True):
        alignment = align(in_train, in_eval, probe, from_behind=from_behind)
        if alignment is None:
            continue
        merge = _Merge(alignment, branched, probe)
        if merge.is_possible():
            return merge
    return None


class _Merge:
    """The merge of two graphs whose nodes lie side by side.

    Args:
        alignment: of the graphs.
        branched: which modules branch on whose modes.
        probe: the model.
    """

    def __init__(self, alignment: Alignment, branched: Branched, probe: nn.Module) -> None:
        self._alignment = alignment
        self._branched = branched
        self._probe = probe
        # The node of the graph of train mode that a node of the other graph is.
        pairs = [*alignment.pairs, *alignment.reads]
        self._partners = {in_eval: in_train for in_train, in_eval in pairs}
        self._owners: dict[fx.Node, str] = {}  # of the nodes of regions, in both graphs
        self._choices: dict[fx.Node, list[_Choice]] = {}
        self._chosen: dict[tuple[Any, ...], fx.Node] = {}

    @property
    def chosen(self) -> Collection[fx.Node]:
        """The nodes that pick a value by the mode."""
        return self._chosen.values()

    def is_possible(self) -> bool:
        """Return whether the graphs can be merged. This changes neither of them."""
        for region in self._alignment.regions:
            owner = self._owner(region.nodes)
            if owner is None or not _can_run_in_mode(region):
                return False
            self._owners.update(dict.fromkeys(region.nodes, owner))
        for in_train, in_eval in self._alignment.pairs:
            choices = self._differences(in_train, in_eval)
            if choices is None:
                return False
            self._choices[in_train] = choices
        return not self._writes_on_chosen()

    def run(self) -> None:
        """Change the graph of train mode."""
        self._move_to_front([in_train for in_train, _ in self._alignment.reads])
        for region in self._alignment.regions:
            for node in region.in_eval:
                self._copy(node, region)
        for node, choices in self._choices.items():
            self._apply(node, choices)
        for region in self._alignment.regions:
            for node in region.in_train:
                self._run_in_mode(node, self._owners[node], True)
            for node in region.in_eval:
                self._run_in_mode(self._partners[node], self._owners[node], False)

    def _move_to_front(self, nodes: list[fx.Node]) -> None:
        """Put nodes that read parameters and buffers before all others that read them."""
        for node in dict.fromkeys(nodes):
            first = next(each for each in node.graph.nodes if each.op != "placeholder")
            if first is not node:
                first.prepend(node)

    def _owner(self, nodes: list[fx.Node]) -> str | None:
        """Return the module whose mode decides whether nodes run.

        The innermost module around them that branches tells on whose mode, which may be that of
        another module. It is None where no module around them branches, or where the modes of
        several modules decide.
        """
        common: list[str] | None = None  # the modules around all nodes, outermost first
        for node in nodes:
            scopes = ["", *(str(path) for path, _ in module_stack(node).values())]
            common = scopes if common is None else [path for path in common if path in scopes]
        branching = [path for path in common or [] if path in self._branched]
        if not branching:
            return None
        return _only_owner(self._branched[branching[-1]])

    def _differences(self, in_train: fx.Node, in_eval: fx.Node) -> list[_Choice] | None:
        """Compare a node in train and in eval mode.

        Returns:
            The numbers and values that differ; None if something else differs, or if it is not
            clear which module's mode they depend on.
        """
        ours, structure = tree_flatten((in_train.args, in_train.kwargs))
        theirs, structure_in_eval = tree_flatten((in_eval.args, in_eval.kwargs))
        if structure != structure_in_eval:
            return None
        choices = []
        for place, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            if self._are_same(our, their):
                continue
            # A number in the place of a tensor may give the value of the node another form.
            can_differ = _are_of_one_kind(our, their) or _are_alike(in_train, in_eval)
            owner = self._owner_of_choice(in_train, our, their)
            if owner is None or not can_differ:
                return None
            choices.append(_Choice(place, owner, (their, our)))
        return choices

    def _are_same(self, our: Any, their: Any) -> bool:
        """Return whether an argument is the same in both modes."""

        def name_of_partner(node: fx.Node) -> Any:
            return self._partners.get(node, f"{node.name} in eval mode")

        return str(our) == str(fx.node.map_arg(their, name_of_partner))

    def _owner_of_choice(self, reader: fx.Node, our: Any, their: Any) -> str | None:
        """Return the module whose mode decides between two arguments, None if there is none."""
        if _is_number(our) and _is_number(their):
            # The innermost, since a module around it may branch on its own mode without effect.
            return self._owner([reader])
        # One of them may be a number: a factor is a tensor in one mode, and 1.0 in the other.
        is_one_number = _is_number(our) or _is_number(their)
        if not is_one_number and not _are_alike(our, their):
            return None
        for node in (our, their):
            if node in self._owners:
                return self._owners[node]
        return self._owner([reader])

    def _writes_on_chosen(self) -> bool:
        """Return whether a node writes in place on a value that is chosen.

        In one mode such a value may be another name of what is written.
        """
        chosen = self._storages_of_choices()
        if not chosen:
            return False
        return any(chosen & storages_written(pair) for pair in self._alignment.pairs)

    def _storages_of_choices(self) -> set[int]:
        """Return the keys of the storages of all tensors that may be chosen."""
        values: list[Any] = []
        for choice in chain.from_iterable(self._choices.values()):
            values += choice.values
        examples = [facts(value).example for value in values if isinstance(value, fx.Node)]
        return {storage_key(example) for example in examples if isinstance(example, Tensor)}

    def _copy(self, node: fx.Node, region: Region) -> None:
        """Copy a node of the graph of eval mode to the end of its region."""
        with region.end.graph.inserting_before(region.end):
            copy = region.end.graph.node_copy(node, self._partners.__getitem__)
        copy.meta = {"nn_module_stack": module_stack(node)}
        set_facts(copy, replace(facts(node), after=()))
        self._partners[node] = copy

    def _run_in_mode(self, node: fx.Node, owner: str, mode: bool) -> None:
        # A parameter or a mode that is read does no harm in the other mode.
        if node.op != "get_attr" and not is_flag(node):
            let_run_in_mode(node, owner, mode, self._probe)

    def _apply(self, node: fx.Node, choices: list[_Choice]) -> None:
        if not choices:
            return
        arguments, structure = tree_flatten((node.args, node.kwargs))
        for choice in choices:
            arguments[choice.place] = self._insert(choice, node)
        node.args, node.kwargs = tree_unflatten(arguments, structure)

    def _insert(self, choice: _Choice, reader: fx.Node) -> fx.Node:
        """Insert before a node what reads a training flag and picks a value by it.

        All readers of a tensor read the same choice.
        """
        in_eval, in_train = choice.values
        key = (in_eval, in_train, choice.owner)
        nodes = [value for value in (in_train, in_eval) if isinstance(value, fx.Node)]
        # Each reader has a choice of its own between two numbers.
        if nodes and key in self._chosen:
            return self._chosen[key]
        flag = _insert_flag(choice.owner, reader, self._probe)
        if isinstance(in_eval, fx.Node):
            in_eval = self._partners[in_eval]
        with reader.graph.inserting_before(reader):
            picked = reader.graph.call_function(pick, (flag, in_eval, in_train))
        if not nodes:
            _note(picked, reader, in_train)
            return picked
        picked.meta = {"nn_module_stack": module_stack(reader)}
        record = replace(facts(nodes[0]), cost=Cost(), writes=(), buffers=frozenset(), after=())
        set_facts(picked, record)
        self._chosen[key] = picked
        return picked


def _only_owner(owners: Collection[str]) -> str | None:
    """Return the one module whose mode decides, None if there are several."""
    return next(iter(owners)) if len(owners) == 1 else None


def _decider(place: str, branched: Branched) -> str:
    """Return the module on whose mode a module branches: itself if there is not exactly one."""
    owner = _only_owner(branched.get(place, ()))
    return place if owner is None else owner


def _can_run_in_mode(region: Region) -> bool:
    """Return whether the nodes of a region can be told to run in one mode only.

    What eval mode writes in place, the trace in train mode does not know of. A guard would refuse
    inputs in both modes.
    """
    if any(facts(node).writes for node in region.in_eval):
        return False
    return not any(is_guard(node) for node in region.nodes)


def _are_of_one_kind(our: Any, their: Any) -> bool:
    return isinstance(our, fx.Node) == isinstance(their, fx.Node)


def _are_alike(our: Any, their: Any) -> bool:
    """Return whether two nodes have tensors of the same form as their values."""
    if not isinstance(our, fx.Node) or not isinstance(their, fx.Node):
        return False
    one, other = facts(our).example, facts(their).example
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    is_same_form = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return is_same_form and facts(our).batch == facts(their).batch


def _guard_in_training(guard: fx.Node, branched: Branched, probe: nn.Module) -> None:
    """Let a guard against a batch of one sample refuse it in train mode alone."""
    condition, outcome, place = guard.args[:3]
    flag = _insert_flag(_decider(str(place), branched), guard, probe)
    guard.args = (condition, outcome, place, flag)


def _draw_in_training(node: fx.Node, branched: Branched, probe: nn.Module) -> None:
    """Let a node that draws for a settled comparison draw in train mode alone.

    The outcome is in the graph, so the comparison is erased. The draw itself moves the generator.
    """
    if not is_draw(node):
        node.graph.erase_node(node)
        return
    places = [path for path, _ in module_stack(node).values() if path in branched]
    place = places[-1] if places else ""
    flag = _insert_flag(_decider(place, branched), node, probe)
    node.args = (flag, _value_before(node), *node.args)
    node.target = draw_where
    set_facts(node, Facts())


def _value_before(node: fx.Node) -> fx.Node | None:
    """Return the last node before a node with a gradient in its value, None if there is none."""
    before = node.prev
    while before.op != "root":
        value = facts(before).example
        if isinstance(value, Tensor) and value.requires_grad and before.op != "get_attr":
            return before
        before = before.prev
    return None


# Guards against a batch of one, by the module that branches and the outcome.
_Guards = dict[tuple[Any, Any], list[fx.Node]]


def _batch_guards(graph: fx.Graph) -> _Guards:
    guards: _Guards = {}
    for node in graph.nodes:
        if is_guard_of_batch(node):
            guards.setdefault((node.args[2], node.args[1]), []).append(node)
    return guards


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _insert_flag(qualname: str, reader: fx.Node, probe: nn.Module) -> fx.Node:
    """Insert before a node what reads the training flag of a module."""
    target = flag_target(probe.get_submodule(qualname), qualname)
    with reader.graph.inserting_before(reader):
        flag = reader.graph.create_node("call_module", target)
    _note(flag, reader, True)
    return flag


def _note(node: fx.Node, reader: fx.Node, example: Any) -> None:
    node.meta = {"nn_module_stack": module_stack(reader)}
    set_facts(node, Facts(example, example))
