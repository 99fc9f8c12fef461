"""Turn the cuts that a policy chose into a block plan."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from sffx.blocks import Block, BlockPlan, Node, Options, Output, Value
from sffx.compiler.analyse import Analysis
from sffx.compiler.cut_sets import main_value
from sffx.compiler.facts import carries_gradient, facts
from sffx.compiler.layers import common_scope, scopes
from sffx.compiler.plan_notes import notes_on_blocks
from sffx.compiler.policies import Cuts
from sffx.compiler.qualnames import name_of_target
from sffx.compiler.trace.flags import is_added
from sffx.compiler.trace.sizes import is_guard
from sffx.errors import InputError
from sffx.learning.vocabulary import notes_on_vocabulary
from sffx.parts import CLASSIFIER, block_name


def partition(
    analysis: Analysis,
    cuts: Cuts,
    options: Options,
    *,
    policy: str = "nodes",
    num_classes: int | None = None,
) -> BlockPlan:
    """Return the plan of the blocks that some cuts make.

    Args:
        analysis: of the traced model.
        cuts: in the order of the model, with all values that cross, as `select` returns them.
        options: of the cut.
        policy: name of the policy that chose the cuts.
        num_classes: J, checked against the width of the logits where given.

    Raises:
        InputError: `num_classes` is not the width of the logits, or the task needs another width.
    """
    analysis = analysis.across(cuts.after)
    width = _width_of_logits(analysis, num_classes)
    outputs = [main_value(cut) for cut in cuts.after]
    members = _members(analysis, outputs)
    *names, name_of_classifier = _names(analysis, members)
    blocks = []
    for i, output in enumerate(outputs):
        blocks.append(_block(analysis, names[i], block_name(i), members[i], output))
    classifier = _block(analysis, name_of_classifier, CLASSIFIER, members[-1], analysis.logits)
    trace = analysis.trace
    last_module = _last_module(trace.root, classifier)
    notes = (
        *trace.notes,
        *cuts.notes,
        *notes_on_blocks(analysis, members, blocks),
        *notes_on_vocabulary(blocks, width, options, trace.task, last_module),
        *options.objective.notes(),
    )
    return BlockPlan(
        model=type(trace.root).__name__,
        policy=policy,
        blocks=tuple(blocks),
        classifier=classifier,
        num_classes=width,
        inputs=trace.inputs,
        arguments=trace.arguments,
        leaves=trace.leaves,
        notes=notes,
        options=options,
        task=trace.task,
        output_keys=trace.output_keys,
    )


def _last_module(root: nn.Module, block: Block) -> nn.Module | None:
    """Return the last module that a block calls, None if it calls none."""
    return root.get_submodule(block.modules[-1]) if block.modules else None


def _width_of_logits(analysis: Analysis, num_classes: int | None) -> int:
    """Return J, checked against what the user and the task ask for."""
    task = analysis.trace.task
    width = task.num_outputs(facts(analysis.nodes[analysis.logits]).example.shape)
    task.require_outputs(width)
    if num_classes not in (None, width):
        raise InputError(
            f"num_classes is {num_classes}, but the model returns {width} logits. "
            "Hint: leave num_classes out"
        )
    return width


def _members(analysis: Analysis, outputs: Sequence[str]) -> list[list[fx.Node]]:
    """Return the nodes of each block and of the classifier, in the order they run.

    A placeholder is in none, since the inputs of the model are at hand in every block.
    """
    ends = [analysis.step_of[output] for output in outputs]
    num_blocks = len(outputs) + 1  # with the classifier
    members: list[list[fx.Node]] = [[] for _ in range(num_blocks)]
    for name, node in analysis.nodes.items():
        if node.op != "placeholder":
            # A cut lies after its step, so the step itself is still in the block before it.
            block = bisect_left(ends, analysis.step_of[name])
            members[block].append(node)
    return members


def _block(analysis: Analysis, name: str, target: str, nodes: list[fx.Node], output: str) -> Block:
    """Return the description of one block.

    Args:
        analysis: of the model.
        name: in the words of the model.
        target: the name of its module in the cut model.
        nodes: of the block, in order.
        output: name of its main output.
    """
    parameters: dict[str, nn.Parameter] = {}
    for node in nodes:
        parameters.update(analysis.parameters(node))
    # A tied weight has several names, and counts once.
    distinct = {id(p): p for p in parameters.values()}
    output_node = analysis.nodes[output]
    sides = _sides(nodes, output)
    detached = [node for node in sides if carries_gradient(node)]
    modules = [str(node.target) for node in nodes if _calls_module(node)]
    macs, activation_bytes = _cost(nodes, analysis.trace.batch_size)
    gives = [_value_of(node) for node in (output_node, *sides)]
    return Block(
        name=name,
        target=target,
        nodes=_names_of(nodes),
        output=output,
        shape=tuple(facts(output_node).example.shape[1:]),
        channel_axis=analysis.channel_axes.get(output, 1),
        inputs=_inputs(nodes),
        sides=_names_of(sides),
        detached=_names_of(detached),
        modules=tuple(modules),
        parameters=tuple(parameters),
        num_parameters=sum(p.numel() for p in distinct.values()),
        macs=macs,
        activation_bytes=activation_bytes,
        gives=tuple(gives),
        mask=analysis.masks.of(output),
        beside=_beside(analysis, nodes, output, _names_of(sides)),
        graph=tuple(_node(analysis, node) for node in nodes if not is_guard(node)),
        is_folded=facts(output_node).is_folded,
    )


def _names_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _inputs(nodes: list[fx.Node]) -> tuple[str, ...]:
    """Return the names of the values that the nodes read from outside, each once."""
    inside = set(nodes)
    names: dict[str, None] = {}
    for node in nodes:
        for arg in node.all_input_nodes:
            if arg not in inside:
                names[arg.name] = None
    return tuple(names)


def _sides(nodes: list[fx.Node], output: str) -> list[fx.Node]:
    """Return the nodes, other than the output, whose values later blocks read."""
    inside = set(nodes)
    sides = []
    for node in nodes:
        if node.name == output:
            continue
        # The output node of the model reads the logits, but lies in no later block.
        if any(user not in inside and user.op != "output" for user in node.users):
            sides.append(node)
    return sides


def _beside(
    analysis: Analysis, nodes: list[fx.Node], output: str, sides: Sequence[str]
) -> tuple[Output, ...]:
    """Return the values, beside the main output, that paths take across the cut.

    Args:
        analysis: of the model.
        nodes: of the block.
        output: its main output.
        sides: the other values that later blocks read. A value is no side if it crosses only in
            the order that a write in place asks for.
    """
    if not sides or output == analysis.logits:
        return ()
    inside = {node.name for node in nodes}
    crossing = [name for name in analysis.flow.crossing(inside) if name in sides]
    beside = []
    for name in crossing:
        # A value that leads to another one of these learns by way of it: in a U-Net, the skip
        # connection of a stage leads to the value that goes down.
        leads_on = not _behind(analysis, name, inside).isdisjoint([*crossing, output])
        # A pool of what the block before has computed has nothing to learn.
        is_scored = not leads_on and analysis.flow.is_learned(name, inside)
        beside.append(_output(analysis, name, is_scored=is_scored))
    return tuple(beside)


def _behind(analysis: Analysis, name: str, inside: set[str]) -> set[str]:
    """Return the nodes of a block that the value of a node leads to."""
    behind = analysis.flow.behind(name, inside)
    for reader in inside.intersection(_readers_of_whole(analysis, name)):
        behind |= {reader, *analysis.flow.behind(reader, inside)}
    return behind


def _readers_of_whole(analysis: Analysis, name: str) -> list[str]:
    """Return the nodes that read the whole of a tuple, of which a node takes one value.

    They read the value as well: an `nn.LSTMCell` takes the pair of the step before, whose hidden
    state goes to the next cell.
    """
    source = analysis.flow.tuple_of(name)
    if not source:
        return []
    readers = analysis.nodes[source].users
    return [reader.name for reader in readers if reader.target is not operator.getitem]


def _output(analysis: Analysis, name: str, *, is_scored: bool) -> Output:
    record = facts(analysis.nodes[name])
    return Output(
        name=name,
        shape=tuple(record.example.shape[1:]),
        channel_axis=analysis.channel_axes.get(name, 1),
        mask=analysis.masks.of(name),
        is_scored=is_scored,
        is_folded=record.is_folded,
    )


def _cost(nodes: list[fx.Node], batch_size: int) -> tuple[int, int]:
    """Return the multiply-adds for one sample, and the bytes kept for its backward pass.

    Args:
        nodes: of a block.
        batch_size: of the trace.
    """
    macs = 0
    saved: dict[int, int] = {}  # by storage: two nodes may keep the same one
    for node in nodes:
        cost = facts(node).cost
        macs += cost.macs
        saved.update(cost.saved)
    return macs // batch_size, sum(saved.values()) // batch_size


def _value_of(node: fx.Node) -> Value:
    """Return the description of a node's value."""
    record = facts(node)
    return _value(node.name, record.example, record.other, record.batch)


def _value(name: str, example: object, other: Any, batch: Any) -> Value:
    """Return the description of a value.

    Args:
        name: of the value.
        example: the value at the first batch size of the trace.
        other: at the second.
        batch: its batch axis, or those of its parts.
    """
    if isinstance(example, Tensor):
        sizes = zip(example.shape, other.shape, strict=True)
        shape = tuple(size if size == other_size else None for size, other_size in sizes)
        dtype = str(example.dtype).removeprefix("torch.")
        return Value(name, shape, dtype, batch=batch)
    if isinstance(example, (tuple, list)):
        parts = []
        # `batch` has no axes where the number of parts changes with the batch.
        for one, two, axis in zip(example, other, batch, strict=False):
            parts.append(_value("", one, two, axis))
        return Value(name, (), type(example).__name__, tuple(parts))
    return Value(name, (), type(example).__name__)


def _node(analysis: Analysis, node: fx.Node) -> Node:
    """Return the description of one node."""
    join = analysis.join(node.name)
    return Node(
        name=node.name,
        call=name_of_target(node.target) or str(node.target),
        is_module=_calls_module(node),
        reads=_names_of(node.all_input_nodes),
        is_path=analysis.is_path(node.name),
        join=join,
        paths=analysis.layers_on_paths(node.name) if join else (),
        arguments=_arguments(node),
    )


def _arguments(node: fx.Node) -> str:
    """Return the arguments of a call as text, with "%0" for the first value that it reads.

    `torch.cat([a, b], dim=1)` has "[%0, %1], dim=1".
    """
    text_of = {}
    for i, source in enumerate(node.all_input_nodes):
        text_of[source] = _Written(f"%{i}")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), text_of.__getitem__)
    written = [repr(value) for value in args]
    written += [f"{name}={value!r}" for name, value in kwargs.items()]
    return ", ".join(written)


class _Written(str):
    """A text that stands without quotes in the text of what holds it."""

    def __repr__(self) -> str:
        return str(self)


def _calls_module(node: fx.Node) -> bool:
    """Return whether a node calls a module of the model; the trace adds some."""
    return node.op == "call_module" and not is_added(node)


# Names of blocks


def _names(analysis: Analysis, members: list[list[fx.Node]]) -> list[str]:
    """Return the name of each block, in the words of the model."""
    paths_of_blocks = []
    num_blocks: Counter[str] = Counter()  # in how many blocks a module has paths
    for nodes in members:
        paths = [node for node in nodes if analysis.is_path(node.name)]
        paths_of_blocks.append(paths)
        num_blocks.update(_modules_around(paths))
    names = []
    for paths in paths_of_blocks:
        is_elsewhere = partial(_is_elsewhere, num_blocks, _modules_around(paths))
        names.append(_name(analysis, paths, is_elsewhere))
    return names


def _is_elsewhere(num_blocks: Counter[str], own: set[str], scope: str) -> bool:
    """Return whether a module has paths in another block than the one with the modules `own`."""
    num_here = 1 if scope in own else 0
    return num_blocks[scope] > num_here


def _modules_around(nodes: list[fx.Node]) -> set[str]:
    """Return the qualnames of the modules whose forward created one of some nodes."""
    around: set[str] = set()
    for node in nodes:
        around.update(scopes(node))
    return around


def _name(analysis: Analysis, nodes: list[fx.Node], is_elsewhere: Callable[[str], bool]) -> str:
    """Return the name of a block: the module that holds all of its paths and no others.

    If there is none, it is the first and the last module that the block does not share:
    "conv1 … layer1.0".

    Args:
        analysis: of the model.
        nodes: the paths of the block.
        is_elsewhere: whether a module has paths in another block.
    """
    stacks = [scopes(node) for node in nodes if scopes(node)]
    owner = common_scope(stacks)
    if owner and not is_elsewhere(owner):
        return _owner_of_container(analysis, owner, _modules_around(nodes), is_elsewhere)
    if not stacks:
        return nodes[-1].name
    # A pool that several blocks call names none of them.
    own = [stack for stack in stacks if not all(map(is_elsewhere, stack))]
    naming = own or stacks
    first = _outermost_own(naming[0], is_elsewhere)
    last = _outermost_own(naming[-1], is_elsewhere)
    return first if first == last else f"{first} … {last}"


def _outermost_own(stack: tuple[str, ...], is_elsewhere: Callable[[str], bool]) -> str:
    """Return the outermost module around a node that no other block shares."""
    return next((scope for scope in stack if not is_elsewhere(scope)), stack[-1])


def _owner_of_container(
    analysis: Analysis, owner: str, around: set[str], is_elsewhere: Callable[[str], bool]
) -> str:
    """Return the module whose only content is a container; a module that is none stays.

    An InvertedResidual of torchvision holds no more than the Sequential `conv`.

    Args:
        analysis: of the model.
        owner: the module, which may be a container.
        around: the modules around the nodes of the block. A `ModuleList` is never among them.
        is_elsewhere: whether a module has paths in another block.
    """
    parent = owner.rpartition(".")[0]
    own = {name for name in around if not is_elsewhere(name)}
    while parent in own and issubclass(analysis.kind(owner), nn.Sequential):
        owner = parent
        parent = parent.rpartition(".")[0]
    return owner
