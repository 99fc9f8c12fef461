"""One graph for both modes: merge what was traced in train mode with what was traced in eval mode.

A branch on `self.training` cannot be a node. Where a forward branches, the model is traced in both
modes. If the two graphs differ in numbers only, as by the dropout of `p if self.training else 0.0`,
each such number becomes a choice by the training flag.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sffx.compiler.facts import Facts, facts, set_facts
from sffx.compiler.qualnames import attribute
from sffx.compiler.trace.flags import flag_target
from sffx.compiler.trace.randomness import draw_where, is_draw, settled_draws
from sffx.compiler.trace.sizes import is_guard_of_batch, without_batch_guards


@dataclass(frozen=True)
class _Choice:
    """A number among a node's arguments that depends on a mode.

    Attributes:
        place: among the flattened arguments of the node.
        owner: qualname of the module whose mode it depends on.
        numbers: in (eval, train) mode, so that the flag, False or True, is the index.
    """

    place: int
    owner: str
    numbers: tuple[int | float, int | float]


def merge_modes(
    graph: fx.Graph, eval_graph: fx.Graph, branched: set[str], probe: nn.Module
) -> bool:
    """Make a graph that was traced in train mode hold for eval mode as well, if that is possible.

    Args:
        graph: traced in train mode; to change.
        eval_graph: of the same model, traced in eval mode.
        branched: qualnames of the modules that branch on their mode.
        probe: the model, which owns the constants of both graphs.

    Returns:
        Whether it was possible; if not, the graph is as it was.
    """
    guards, guards_in_eval = _batch_guards(graph), _batch_guards(eval_graph)
    compared, compared_in_eval = list(graph.nodes), list(eval_graph.nodes)
    if guards:
        # A forward may look at the batch in one mode only: `self.training and x.shape[0] == 1`.
        compared = without_batch_guards(graph)
        compared_in_eval = without_batch_guards(eval_graph)
    draws, draws_in_eval = settled_draws(graph), settled_draws(eval_graph)
    draws_in_training = draws if draws and not draws_in_eval else []
    compared = [node for node in compared if node not in draws_in_training]
    is_refused_in_eval_alone = not guards_in_eval.keys() <= guards.keys()
    if len(compared) != len(compared_in_eval) or is_refused_in_eval_alone:
        return False
    pairs = list(zip(compared, compared_in_eval, strict=True))
    names = {in_eval.name: in_train.name for in_train, in_eval in pairs}
    choices_by_node: dict[fx.Node, list[_Choice]] = {}
    for in_train, in_eval in pairs:
        if not _call_the_same(in_train, in_eval, probe):
            return False
        choices = _differences(in_train, in_eval, names, branched)
        if choices is None:
            return False
        choices_by_node[in_train] = choices
    for node, choices in choices_by_node.items():
        _apply(node, choices, probe)
    for key in guards.keys() - guards_in_eval.keys():
        for guard in guards[key]:
            flag = _insert_flag(str(guard.args[2]), guard, probe)
            guard.args = (*guard.args[:3], flag)
    for node in reversed(draws_in_training):
        _draw_in_training(node, branched, probe)
    return True


def _draw_in_training(node: fx.Node, branched: set[str], probe: nn.Module) -> None:
    """Let a node that draws for a settled comparison draw in train mode alone.

    The outcome is in the graph, so the comparison is erased. The draw itself moves the generator.
    """
    if not is_draw(node):
        node.graph.erase_node(node)
        return
    scopes = node.meta.get("nn_module_stack", {}).values()
    owners = [path for path, _ in scopes if path in branched]
    flag = _insert_flag(owners[-1] if owners else "", node, probe)
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


def _differences(
    in_train: fx.Node, in_eval: fx.Node, names: dict[str, str], branched: set[str]
) -> list[_Choice] | None:
    """Compare a node in train and in eval mode.

    Returns:
        The arguments that differ; None if not only numbers differ, or if it is not clear which
        module's mode they depend on.
    """
    train_arguments, structure = tree_flatten((in_train.args, in_train.kwargs))
    eval_arguments, eval_structure = tree_flatten((in_eval.args, in_eval.kwargs))
    if structure != eval_structure:
        return None
    scopes = in_train.meta.get("nn_module_stack", {}).values()
    owners = [path for path, _ in scopes if path in branched]
    choices = []
    for place, (ours, theirs) in enumerate(zip(train_arguments, eval_arguments, strict=True)):
        if _spelled(ours, {}) == _spelled(theirs, names):
            continue
        if not owners or not _is_number(ours) or not _is_number(theirs):
            return None
        # The innermost, since a module around it may branch on its own mode without effect.
        choices.append(_Choice(place, owners[-1], (theirs, ours)))
    return choices


def _call_the_same(in_train: fx.Node, in_eval: fx.Node, probe: nn.Module) -> bool:
    if in_train.op != in_eval.op:
        return False
    if in_train.op == "placeholder" or str(in_train.target) == str(in_eval.target):
        return True
    if in_train.op != "get_attr":
        return False
    # The same constant, made in each trace anew.
    ours, theirs = (attribute(probe, str(node.target)) for node in (in_train, in_eval))
    if any(type(value) is not Tensor for value in (ours, theirs)):
        return False
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _spelled(argument: Any, names: dict[str, str]) -> str:
    """Write an argument as text, the nodes in it by these names or else by their own."""
    return str(fx.node.map_arg(argument, lambda node: names.get(node.name, node.name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _apply(node: fx.Node, choices: list[_Choice], probe: nn.Module) -> None:
    if not choices:
        return
    arguments, structure = tree_flatten((node.args, node.kwargs))
    for choice in choices:
        arguments[choice.place] = _insert(choice, node, probe)
    node.args, node.kwargs = tree_unflatten(arguments, structure)


def _insert(choice: _Choice, reader: fx.Node, probe: nn.Module) -> fx.Node:
    """Insert before a node what reads a training flag and picks a number by it."""
    flag = _insert_flag(choice.owner, reader, probe)
    with reader.graph.inserting_before(reader):
        arguments = (choice.numbers, flag)
        number = reader.graph.create_node("call_function", operator.getitem, arguments)
    _note(number, reader, choice.numbers[1])
    return number


def _insert_flag(qualname: str, reader: fx.Node, probe: nn.Module) -> fx.Node:
    """Insert before a node what reads the training flag of a module."""
    target = flag_target(probe.get_submodule(qualname), qualname)
    with reader.graph.inserting_before(reader):
        flag = reader.graph.create_node("call_module", target)
    _note(flag, reader, True)
    return flag


def _note(node: fx.Node, reader: fx.Node, example: Any) -> None:
    node.meta = {"nn_module_stack": reader.meta.get("nn_module_stack", {})}
    set_facts(node, Facts(example, example))
