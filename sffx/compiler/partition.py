"""Turn the cuts that a policy chose into a block plan."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import takewhile

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sffx.blocks import Block, BlockPlan, Node, Options, Value
from sffx.compiler.analyse import Analysis, common_scope, scopes
from sffx.compiler.examples import TRACE_BATCH
from sffx.compiler.facts import facts
from sffx.compiler.policies import Policy, notes
from sffx.compiler.trace.flags import is_flag
from sffx.errors import InputError, in_brief
from sffx.parts import CLASSIFIER, block_name


def make_plan(
    analysis: Analysis,
    name: str,
    policy: Policy,
    num_classes: int | None = None,
    options: Options | None = None,
) -> BlockPlan:
    """Ask the policy where to cut and describe the blocks that come of it.

    Args:
        analysis: of the traced model.
        name: of the policy.
        policy: a function of the analysis to the names of the nodes to cut after.
        num_classes: J, checked against the width of the logits where given.
        options: how the blocks will learn, by default if None.

    Raises:
        CutError: the policy chose no node, or one where no cut can be made.
        InputError: `num_classes` is not what the model returns.
    """
    cuts = analysis.require(policy(analysis))
    width = int(facts(analysis.nodes[analysis.logits]).example.shape[1])
    if width < 2:
        raise InputError(
            "the model returns one logit, but a goodness tells classes apart. Hint: for two classes, give it two logits"
        )
    if num_classes not in (None, width):
        raise InputError(
            f"num_classes is {num_classes}, but the model returns {width} logits. Hint: leave num_classes out"
        )
    trace = analysis.trace
    members = _members(analysis, cuts)
    names = _names(analysis, members)
    targets = [*(block_name(i) for i in range(len(cuts))), CLASSIFIER]
    ends = (*cuts, analysis.logits)
    blocks = [_block(analysis, *what) for what in zip(names, targets, members, ends, strict=True)]
    return BlockPlan(
        model=type(trace.root).__name__,
        policy=name,
        blocks=tuple(blocks[:-1]),
        classifier=blocks[-1],
        num_classes=width,
        inputs=trace.inputs,
        leaves=trace.leaves,
        notes=(
            *trace.notes,
            *notes(name, analysis),
            *_shared_notes(analysis),
            *_padding_notes(analysis, blocks),
        ),
        options=options or Options(),
    )


def _shared_notes(analysis: Analysis) -> list[str]:
    shared = analysis.shared
    return (
        [f"no cut can lie between uses of {in_brief(shared, 3)}: what learns belongs to one block"]
        if shared
        else []
    )


def _members(analysis: Analysis, cuts: tuple[str, ...]) -> list[list[fx.Node]]:
    """Return the nodes of each block, in the order they run."""
    ends = [analysis.step_of[cut] for cut in cuts]
    members: list[list[fx.Node]] = [[] for _ in range(len(cuts) + 1)]
    for name, node in analysis.nodes.items():
        if node.op != "placeholder":
            members[bisect_left(ends, analysis.step_of[name])].append(node)
    return members


def _block(analysis: Analysis, name: str, target: str, nodes: list[fx.Node], output: str) -> Block:
    inside = {node.name for node in nodes}
    value = facts(analysis.nodes[output]).example
    parameters = {name: p for node in nodes for name, p in analysis.parameters(node).items()}
    sides = [
        node
        for node in nodes
        if node.name != output
        and any(user.name not in inside and user.op != "output" for user in node.users)
    ]
    return Block(
        name=name,
        target=target,
        nodes=tuple(node.name for node in nodes),
        output=output,
        shape=tuple(value.shape[1:]),
        channel_axis=analysis.channel_axes.get(output, 1),
        inputs=tuple(
            dict.fromkeys(
                arg.name for node in nodes for arg in node.all_input_nodes if arg.name not in inside
            )
        ),
        sides=tuple(node.name for node in sides),
        detached=tuple(node.name for node in sides if _carries_gradient(node)),
        modules=tuple(
            str(node.target) for node in nodes if node.op == "call_module" and not is_flag(node)
        ),
        parameters=tuple(parameters),
        num_parameters=sum(p.numel() for p in {id(p): p for p in parameters.values()}.values()),
        macs=sum(facts(node).cost.macs for node in nodes) // TRACE_BATCH,
        activation_bytes=sum(
            {key: size for node in nodes for key, size in facts(node).cost.saved.items()}.values()
        )
        // TRACE_BATCH,
        gives=tuple(
            _value(given, facts(analysis.nodes[given]).example)
            for given in (output, *(node.name for node in sides))
        ),
        mask=_mask(analysis, output),
        graph=tuple(_node(analysis, node) for node in nodes),
    )


def _value(name: str, example: object) -> Value:
    """Describe a value by its example."""
    if isinstance(example, Tensor):
        # TRACE_BATCH is a size that nothing else is likely to have.
        shape = tuple(None if size == TRACE_BATCH else size for size in example.shape)
        return Value(name, shape, str(example.dtype).removeprefix("torch."))
    if isinstance(example, (tuple, list)):
        parts = tuple(_value("", part) for part in example)
        return Value(name, (), type(example).__name__, parts)
    return Value(name, (), type(example).__name__)


def _node(analysis: Analysis, node: fx.Node) -> Node:
    join = analysis.join(node.name)
    return Node(
        name=node.name,
        call=str(node.target)
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target)),
        is_module=node.op == "call_module" and not is_flag(node),
        reads=tuple(arg.name for arg in node.all_input_nodes),
        is_path=analysis.is_path(node.name),
        join=join,
        paths=analysis.layers_on_paths(node.name) if join else (),
    )


def _mask(analysis: Analysis, output: str) -> str:
    """Return the input that tells which tokens of a value (B, T, C) are real, "" where the value has no tokens or others than the input."""
    shape = facts(analysis.nodes[output]).example.shape
    if len(shape) != 3 or analysis.channel_axes.get(output) != 2:
        return ""
    return next(
        (node.name for node in _masks(analysis) if facts(node).example.shape == shape[:2]), ""
    )


def _masks(analysis: Analysis) -> list[fx.Node]:
    placeholders = takewhile(
        lambda node: node.op == "placeholder", analysis.nodes.values()
    )  # they come first in a trace
    return [
        node
        for node, read in zip(placeholders, analysis.trace.inputs, strict=True)
        if read.marks_tokens
    ]


def _padding_notes(analysis: Analysis, blocks: list[Block]) -> list[str]:
    masked = [block.target for block in blocks[:-1] if block.mask]
    others = [block.target for block in blocks[:-1] if len(block.shape) == 2 and not block.mask]
    names = ", ".join(str(node.target) for node in _masks(analysis))
    notes = (
        [f"the goodness and norm of {', '.join(masked)} run over the real tokens, by {names}"]
        if masked
        else []
    )
    if names and others:
        notes.append(
            f"{', '.join(others)} return other tokens than {names} marks: their goodness and norm run over padding as well"
        )
    return notes


def _carries_gradient(node: fx.Node) -> bool:
    return any(
        isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(facts(node).example)
    )


def _unit(analysis: Analysis, owner: str, is_elsewhere: Callable[[str], bool]) -> str:
    """Return the module that a container is all there is of, as an InvertedResidual is its Sequential `block`."""
    parent = owner.rpartition(".")[0]
    while parent and not is_elsewhere(parent) and issubclass(analysis.kind(owner), nn.Sequential):
        owner, parent = parent, parent.rpartition(".")[0]
    return owner


def _names(analysis: Analysis, members: list[list[fx.Node]]) -> list[str]:
    paths = [[node for node in nodes if analysis.is_path(node.name)] for nodes in members]
    held = [{scope for node in nodes for scope in scopes(node)} for nodes in paths]
    blocks = Counter(
        scope for own in held for scope in own
    )  # in how many blocks a module has paths
    return [
        _name(analysis, nodes, partial(_is_elsewhere, blocks, own))
        for nodes, own in zip(paths, held, strict=True)
    ]


def _is_elsewhere(blocks: Counter[str], own: set[str], scope: str) -> bool:
    """Whether a module has paths in a block besides the one that has paths in `own`."""
    return blocks[scope] > (scope in own)


def _name(analysis: Analysis, nodes: list[fx.Node], is_elsewhere: Callable[[str], bool]) -> str:
    """Name a block by the one module that is all its paths lie in, else by the first and the last module that it does not share."""
    stacks = [stack for stack in map(scopes, nodes) if stack]
    owner = common_scope(stacks)
    if owner and not is_elsewhere(owner):
        return _unit(analysis, owner, is_elsewhere)
    own = [
        next((scope for scope in stack if not is_elsewhere(scope)), stack[-1]) for stack in stacks
    ]
    if not own:
        return nodes[-1].name
    return own[0] if own[0] == own[-1] else f"{own[0]} … {own[-1]}"
