"""Remarks about a traced model: what of the original is no part of the graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from sffx.compiler.qualnames import holders, in_common, outermost, parameters_of
from sffx.compiler.trace.checkpointing import LEFT_OUT
from sffx.compiler.trace.leaves import has_backward_hooks
from sffx.compiler.trace.sizes import SETTLED_BY_SIZE, batch_guard_notes
from sffx.compiler.trace.steps_first import batch_read_as_steps
from sffx.compiler.trace.surroundings import readers_of_surroundings
from sffx.errors import in_brief


def notes(
    root: nn.Module,
    graph: fx.Graph,
    *,
    constants: Mapping[str, Any],
    kept: Sequence[str],
    left_behind: Sequence[str],
    checkpointed: bool,
    unvalidated: bool,
    left_out: Collection[str],
    checks: Mapping[str, str],
    asked: Collection[str],
    is_of_size: bool,
) -> Iterator[str]:
    """Yield the remarks.

    Args:
        root: the traced model.
        graph: of it.
        constants: the arguments that are no tensors.
        kept: qualnames of tensors that the model computes in its first call only.
        left_behind: qualnames of the attributes in which the forward leaves tensors.
        checkpointed: whether the trace met gradient checkpointing.
        unvalidated: whether the forward makes distributions.
        left_out: the context managers in the forward that are no part of the graph.
        checks: the conditions of checks of values, by where they stand.
        asked: the questions about torch's state that the forward asks.
        is_of_size: whether the graph holds what is otherwise at another size of the input.
    """
    if constants:
        settled = [f"{path} is {value!r}" for path, value in constants.items()]
        yield f"settled as in the example: {in_brief(settled, 4)}"
    yield from _notes_on_attributes(kept, left_behind)
    yield from _notes_on_hooks(root, graph)
    idle = _idle(root, _used_parameters(root, graph))
    if idle:
        yield f"left out, since the logits do not depend on them: {in_brief(idle, 4)}"
    if checkpointed:
        yield LEFT_OUT
    if unvalidated:
        yield "torch.distributions does not check the values of its arguments in the cut model"
    if checks:
        written = [f"{condition} ({place})" for place, condition in checks.items()]
        yield f"the cut model does not check the values of tensors: {in_brief(written, 4)}"
    yield from _notes_on_regions(left_out, asked)
    yield from _notes_on_code(root, graph)
    if is_of_size:
        yield SETTLED_BY_SIZE
    yield from batch_guard_notes(graph)


def _notes_on_code(root: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """Yield the remarks on what forwards read and do beside the graph."""
    readers = readers_of_surroundings(module for _, module in _inlined(root, graph))
    if readers:
        yield (
            f"the forward names {in_brief(readers, 4)}: the cut model keeps what these gave when "
            "the model was cut"
        )
    if _nests_padded(root, graph):
        yield (
            "torch.nn.TransformerEncoder sets padding to zero in eval mode under no_grad, by "
            "nested tensors; the cut model does not. Hint: enable_nested_tensor=False makes the "
            "encoder do what the cut model does"
        )
    reads = batch_read_as_steps(graph, root)
    if reads:
        yield (
            f"{reads} the batch as the steps of a sequence, so the samples of a batch change each "
            "other's scores. Hint: batch_first=True, or x.transpose(0, 1) before it"
        )


def _notes_on_attributes(kept: Sequence[str], left_behind: Sequence[str]) -> Iterator[str]:
    """Yield the remarks on attributes that the forward sets, as in `notes`."""
    if kept:
        yield (
            f"the model computes {in_brief(kept, 4)} in its first call and keeps it: the cut model "
            "computes it in each call, and so follows the weights and inputs that it is made of"
        )
    set_anew = [name for name in left_behind if name not in kept]
    if set_anew:
        yield f"the forward sets {in_brief(set_anew, 4)} in each call, which the cut model does not"


def _notes_on_hooks(root: nn.Module, graph: fx.Graph) -> Iterator[str]:
    if root._forward_hooks or root._forward_pre_hooks:
        yield "the hooks of the model itself are no part of the cut model; those of its layers are"
    inlined = dict(_inlined(root, graph))
    hooked = [name for name, module in inlined.items() if name and _has_hooks(module)]
    if hooked:
        yield (
            f"hooks of {', '.join(in_common(hooked))} ran during the trace alone: their operations "
            "on tensors are part of the cut model, and what else they do is not"
        )
    backward = [name for name, module in root.named_modules() if has_backward_hooks(module)]
    called = [name for name in backward if name not in inlined]
    if called:
        yield (
            "the first layer of a block computes no gradient of its input, as that of a model: a "
            f"backward hook of {in_brief(called, 4)} is given None for it there"
        )


def _notes_on_regions(left_out: Collection[str], asked: Collection[str]) -> Iterator[str]:
    """Yield the remarks on context managers and on questions about them, as in `notes`."""
    if left_out:
        yield (
            f"left out, since a graph has no regions: {', '.join(left_out)}. Where that matters, "
            "set it around the calls of the cut model"
        )
    if asked:
        yield (
            f"the forward asks for {', '.join(asked)}: the cut model always does what it does with "
            "gradients, and without autocast"
        )


def _inlined(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the cut model does not call, since their forward is in the graph."""
    called = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    for name, module in root.named_modules():
        if name not in called and called.isdisjoint(holders(name)):
            yield name, module


def _nests_padded(root: nn.Module, graph: fx.Graph) -> bool:
    """Whether an encoder that may use nested tensors has layers that are given padding."""
    encoders = [each for each in root.modules() if isinstance(each, nn.TransformerEncoder)]
    if not any(encoder.enable_nested_tensor for encoder in encoders):
        return False
    masks = [node.kwargs.get("src_key_padding_mask") for node in graph.nodes]
    return any(mask is not None for mask in masks)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or bool(module._backward_pre_hooks)


def _used_parameters(root: nn.Module, graph: fx.Graph) -> set[int]:
    """Return the `id` of each parameter that the graph reads."""
    used: set[int] = set()
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            used.update(id(p) for p in parameters_of(root, str(node.target)).values())
    return used


def _idle(root: nn.Module, used: set[int]) -> list[str]:
    """Return the outermost modules none of whose parameters is used, and unused parameters."""
    idle = []
    for name, module in root.named_modules():
        owned = {id(p) for p in module.parameters()}
        if name and owned and not owned & used:
            idle.append(name)
    for name, parameter in root.named_parameters():
        if id(parameter) not in used:
            idle.append(name)
    return outermost(idle)
