"""Notes on the blocks of a plan: what a user would not expect of them."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx
from torch import fx

from sffx.blocks import Block, Output
from sffx.compiler.analyse import Analysis
from sffx.compiler.facts import facts
from sffx.errors import in_brief
from sffx.parts import listed_blocks
from sffx.tasks import Task

DRAWS_IN_ANOTHER_ORDER = (
    "each block runs its layers for all streams, so that dropout and the like draw other random "
    "numbers than in the model"
)


def notes_on_blocks(
    analysis: Analysis, members: list[list[fx.Node]], blocks: list[Block]
) -> list[str]:
    """Return notes on the blocks of a plan, one sentence each.

    Args:
        analysis: of the model.
        members: the nodes of each block and of the classifier, in order.
        blocks: the feature blocks.
    """
    return [
        *_shared_notes(analysis),
        *_order_notes(analysis, members),
        *_padding_notes(analysis, blocks),
        *_instance_notes(blocks, analysis.trace.task),
        *_sequence_notes(analysis, blocks),
    ]


def _shared_notes(analysis: Analysis) -> list[str]:
    if not analysis.shared:
        return []
    shared = in_brief(analysis.shared, 3)
    return [f"no cut can lie between uses of {shared}: what learns belongs to one block"]


def _order_notes(analysis: Analysis, members: list[list[fx.Node]]) -> list[str]:
    """Return a note where the blocks draw random numbers in another order than the model."""
    drawing = []
    for nodes in members:
        drawing += [node.name for node in nodes if facts(node).cost.draws]
    return [DRAWS_IN_ANOTHER_ORDER] if drawing != analysis.flow.in_order(drawing) else []


def _padding_notes(analysis: Analysis, blocks: list[Block]) -> list[str]:
    """Return notes on the feature blocks that leave padding out, and on those that do not."""
    names = ", ".join(str(node.target) for node in analysis.masks.nodes)
    masked = []
    others = []
    for block in blocks:
        if any(output.mask for output in block.outputs):
            masked.append(block.target)
        if any(_has_other_tokens(output) for output in block.outputs):
            others.append(block.target)
    notes = []
    if masked:
        listed = listed_blocks(masked)
        notes.append(f"the goodness and norm of {listed} run over the real tokens, by {names}")
    if names and others:
        listed = listed_blocks(others)
        notes.append(
            f"{listed} return other tokens than {names} marks: "
            "their goodness and norm run over padding as well"
        )
    return notes


def _has_other_tokens(output: Output) -> bool:
    """Return whether a value has tokens that no mask of the model marks."""
    return not output.mask and len(output.shape) == 2 and not output.is_folded


def _sequence_notes(analysis: Analysis, blocks: list[Block]) -> list[str]:
    """Return notes on feature blocks that may be scored by the targets of another sequence.

    Such a block does not depend on the tokens that the output depends on. Two sequences of the same
    length cannot be told apart otherwise.
    """
    if analysis.trace.task.form != "token":
        return []
    notes = []
    for name, tokens in _token_inputs(analysis):
        apart = []
        for block in blocks[1:]:
            if tokens.name not in nx.ancestors(analysis.flow.graph, block.output):
                apart.append(block.target)
        if apart:
            do, are = ("does", "is") if len(apart) == 1 else ("do", "are")
            notes.append(
                f"{in_brief(apart, 3)} {do} not depend on {name}, but {are} scored by the same "
                "targets. Hint: if these are two sequences, an example_input with two lengths "
                "keeps cuts out of the one without targets"
            )
    return notes


def _token_inputs(analysis: Analysis) -> Iterator[tuple[str, fx.Node]]:
    """Yield the inputs with as many tokens as the output, which depends on them."""
    tokens = facts(analysis.nodes[analysis.logits]).example.shape[1:2]
    used = nx.ancestors(analysis.flow.graph, analysis.logits)
    # The nodes of the inputs come first.
    for node, record in zip(analysis.nodes.values(), analysis.trace.inputs, strict=False):
        are_tokens = not record.is_float and not record.marks_tokens and record.shape == tokens
        if are_tokens and node.name in used:
            yield record.name, node


def _instance_notes(blocks: list[Block], task: Task) -> list[str]:
    """Return a note on the feature blocks whose heads read the instances of a sample one by one.

    A task of positions needs none: there each instance is scored.
    """
    if task.per_position:
        return []
    folded = []
    for block in blocks:
        if any(output.is_folded for output in block.scored):
            folded.append(block.target)
    if not folded:
        return []
    return [
        f"{in_brief(folded, 3)} read instances that the model folds into the batch: "
        "the goodness of a sample is the mean of theirs"
    ]
