"""Decisions that a forward takes by the sizes of its input, and what becomes of them in a graph.

`if x.shape[-1] % 8` and `int(x.shape[2] / 4)` are settled by the example: a graph holds the
outcome. So it also holds a guard, which refuses an input with another outcome:

    mod = getitem % 8
    require_settled(mod, False, "stem")
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.compiler.facts import change_facts, facts
from sffx.compiler.qualnames import name_of_target
from sffx.compiler.trace.data_shapes import is_recorded, require_data, where_in_model
from sffx.compiler.walks import numbers_behind
from sffx.errors import InputError

SETTLED_BY_SIZE = (
    "the forward branches on sizes of its input, or computes with them, as for the example alone: "
    "the cut model refuses an input of a size at which it would compute something else"
)

SETTLED_BY_BATCH = (
    "the forward does something else with a batch of one sample{mode}, "
    "which the cut model refuses{mode}"
)

PARTS_OF_BATCH = (
    "the forward splits the batch into {parts} parts: the cut model refuses what has fewer, as it "
    "may be with a batch of one sample"
)

# The values of nodes on another example.
Values = dict[fx.Node, Any]


@fx.node.has_side_effect
def require_settled(value: Any, outcome: Any, place: str) -> None:
    """Raise an InputError if what a forward reads off a size is not what the graph holds.

    Args:
        value: a number that is made of sizes, or the parts into which a tensor was split.
        outcome: the number, the truth value or the number of parts of the example.
        place: qualname of the module that reads it, "" for the model itself.
    """
    if is_recorded(require_settled, value, outcome, place):
        return
    found = read_as(outcome, value)
    if found != outcome:
        raise InputError(
            f"{where_in_model(place)} computes something else at this size of the input: what it "
            f"reads off the size is {found}, and {outcome} in the example that the model was cut "
            "for. "
            "Hint: pass inputs of the size of the example, or cut the model for this size, "
            "sffx.transform(model, example_input=x)"
        )


@fx.node.has_side_effect
def require_several(value: Any, outcome: bool, place: str, is_met: Any = True) -> None:
    """Raise an InputError if a batch has one sample, for which a forward does something else.

    Args:
        value: the truth value that the forward branches on.
        outcome: its value for two samples or more.
        place: qualname of the module that branches, "" for the model itself.
        is_met: whether the forward reaches the branch in the mode of this call.
    """
    if is_recorded(require_several, value, outcome, place, is_met):
        return
    if is_met and bool(value) != outcome:
        raise InputError(
            f"{where_in_model(place)} does something else with a batch of one sample than with "
            "others, and the cut model does what it does with others. Hint: pass two samples or "
            "more; in a DataLoader, drop_last=True leaves out a last batch of one"
        )


def read_as(outcome: Any, value: Any) -> Any:
    """Return a value as a forward has read it, as a number, a truth value or a length."""
    if isinstance(outcome, bool):
        return bool(value)
    return len(value) if isinstance(value, (tuple, list)) else type(outcome)(value)


def is_guard(node: fx.Node) -> bool:
    """Whether a node refuses other sizes of an input, or of the batch, or other data."""
    return node.target in (require_settled, require_several, require_data)


def is_guard_of_batch(node: fx.Node) -> bool:
    """Whether a node refuses a batch of one sample."""
    return node.target is require_several


def without_batch_guards(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes, except guards against a batch of one and the sizes that only they read."""
    left_out: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_of_size = node.op != "output" and _computes_a_size(node)
        if is_guard_of_batch(node) or (is_of_size and left_out.issuperset(node.users)):
            left_out.add(node)
    return [node for node in graph.nodes if node not in left_out]


def batch_guard_notes(graph: fx.Graph) -> list[str]:
    """Return the notes on what a graph refuses of small batches."""
    notes = []
    for node in graph.nodes:
        if is_guard_of_batch(node):
            mode = " in train mode" if len(node.args) > 3 else ""
            notes.append(SETTLED_BY_BATCH.format(mode=mode))
        elif node.target is require_settled and parts_the_batch(node.args[0]):
            notes.append(PARTS_OF_BATCH.format(parts=node.args[1]))
    return list(dict.fromkeys(notes))


def remove_guards(graph: fx.Graph) -> None:
    """Remove the guards from a graph, and what only they need."""
    for node in list(graph.nodes):
        if is_guard(node):
            _erase(node)


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing reads, and the sizes that only it reads."""
    reads = node.all_input_nodes
    node.graph.erase_node(node)
    for read in reads:
        if not read.users and _computes_a_size(read):
            _erase(read)


def _computes_a_size(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target is getattr or node.target.__module__ == "_operator"
    return node.op == "call_method" and node.target == "size"


def reads_a_size(node: fx.Node) -> bool:
    """Whether a node's value, a number or a truth value, is made from the sizes of a tensor."""
    return any(_is_read_off_sizes(each) for each in numbers_behind(node))


def _is_read_off_sizes(node: fx.Node) -> bool:
    is_shape = isinstance(facts(node).example, torch.Size)
    return is_shape or _name_of_reading(node) in _READ_OFF_SIZES


# What torch reads off the sizes of a tensor.
_READ_OFF_SIZES = ("size", "numel", "nelement", "stride", "storage_offset", "nbytes")


def _name_of_reading(node: fx.Node) -> str:
    """Return the name of the function, method or attribute that a node reads."""
    return name_of_target(node.args[1] if node.target is getattr else node.target)


def is_complete(graph: fx.Graph, values: Values) -> bool:
    """Return whether a graph ran to its end on other inputs, given the values of its nodes."""
    return all(node in values or node.op == "output" or is_guard(node) for node in graph.nodes)


def note_resized(graph: fx.Graph, others: list[Values]) -> None:
    """Note the value of each node at the first other size that the whole graph takes."""
    for values in others:
        if is_complete(graph, values):
            for node, value in values.items():
                change_facts(node, resized=value)
            return


def drop_idle_guards(graph: fx.Graph, others: list[Values]) -> bool:
    """Remove the guards that can refuse nothing, such as those that read the number of channels.

    Args:
        graph: of the model.
        others: the values of its nodes on examples of other sizes, as far as the graph runs there.

    Returns:
        Whether a guard refuses one of the other sizes.
    """
    for guard in _guards_of_size(graph):
        condition, outcome, _ = cast(_Arguments, guard.args)
        if parts_the_batch(condition):  # other sizes have as many parts, a small batch has not
            continue
        if others and not any(_varies(condition, outcome, values) for values in others):
            _erase(guard)
    return any(refused(graph, values) for values in others)


def parts_the_batch(node: fx.Node) -> bool:
    """Whether a node splits the batch, as `x.chunk(2)`, so that no part has all samples."""
    record = facts(node)
    if not isinstance(record.example, (tuple, list)) or len(record.example) != len(record.other):
        return False
    for one, two, batch in zip(record.example, record.other, record.batch, strict=True):
        if isinstance(one, Tensor) and batch is None and one.shape != two.shape:
            return True
    return False


def refused(graph: fx.Graph, values: Values) -> bool:
    """Return whether a guard refuses the values of the nodes, or misses the one that it checks."""
    for guard in _guards_of_size(graph):
        condition, outcome, _ = cast(_Arguments, guard.args)
        if _is_refused(condition, outcome, values):
            return True
    return False


def _is_refused(condition: fx.Node, outcome: Any, values: Values) -> bool:
    """Whether the value of a condition is missing, or has another outcome than the example's."""
    return condition not in values or read_as(outcome, values[condition]) != outcome


# The arguments of `require_settled`: the condition, its outcome, and the place in the model.
_Arguments = tuple[fx.Node, Any, str]


def _guards_of_size(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is require_settled]


def _varies(condition: fx.Node, outcome: Any, values: Values) -> bool:
    """Whether the value of a guard, or a number that it is computed from, is not the example's."""
    if _is_refused(condition, outcome, values):
        return True
    ahead = [condition]
    while ahead:
        node = ahead.pop()
        example = facts(node).example
        if _is_of_numbers(example) and values[node] != example:
            return True
        for read in node.all_input_nodes:
            # Where one size is taken of a shape, the other sizes do not count.
            takes_one_size = node.target is operator.getitem and isinstance(example, int)
            if not takes_one_size and _is_of_numbers(facts(read).example):
                ahead.append(read)
    return False


def _is_of_numbers(value: Any) -> bool:
    """Whether a value is a size, a shape, or computed from such."""
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, (int, float)) for part in parts)


def other_arguments(arguments: dict[str, Any], mode: FakeTensorMode) -> Iterator[dict[str, Any]]:
    """Yield the arguments with images or sequences of other sizes, all inputs changed alike.

    Floats (B, F) are features as a rule. As waves (B, T) they come last.
    """
    # The example's own sizes count as tried: they are no other sizes.
    tried = [[value.shape for value in arguments.values()]]
    # The last one changes first: all changes with floats as features come before those as waves.
    changes = itertools.product((False, True), (_one_more, _twice, _half), (1, 2))
    for are_waves, change, axis_of_length in changes:
        changed = {}
        for name, value in arguments.items():
            axes = _sizes(value, axis_of_length, are_waves)
            changed[name] = _resized(value, change, axes, mode)
        shapes = [value.shape for value in changed.values()]
        if shapes not in tried:
            tried.append(shapes)
            yield changed


def _one_more(size: int) -> int:
    return size + 1


def _twice(size: int) -> int:
    return 2 * size


def _half(size: int) -> int:
    return size // 2


def _resized(
    value: Any, change: Callable[[int], int], axes: list[int], mode: FakeTensorMode
) -> Any:
    """Return an argument with other sizes of some axes; the same where there are none."""
    if not axes:
        return value
    shape = list(value.shape)
    for axis in axes:
        shape[axis] = change(shape[axis])
    with mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _sizes(value: Any, axis_of_length: int, are_waves: bool) -> list[int]:
    """Return the axes that are heights, widths or lengths.

    Args:
        value: an image (B, C, H, W), tokens (B, T), a wave (B, T), a sequence (B, T, C) or a signal
            (B, C, T).
        axis_of_length: of a sequence or a signal, which cannot be told apart.
        are_waves: whether floats (B, T) are waves.
    """
    if not isinstance(value, Tensor):
        return []
    if value.ndim > 3:
        return list(range(2, value.ndim))
    if value.ndim == 3:
        return [axis_of_length]
    is_length = are_waves or not value.is_floating_point()
    return [1] if value.ndim == 2 and is_length else []
