"""Trace again and again: what cannot be traced becomes a leaf, until the rest can be traced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from sffx.compiler.facts import facts
from sffx.compiler.trace.constants import place_constants
from sffx.compiler.trace.held_tensors import HeldTensors
from sffx.compiler.trace.leaves import add_leaves
from sffx.compiler.trace.listed import READS_A_NUMBER
from sffx.compiler.trace.modes import merge_modes
from sffx.compiler.trace.outputs import keep_logits
from sffx.compiler.trace.own_state import tensors_left
from sffx.compiler.trace.randomness import call_without_draws
from sffx.compiler.trace.runner import OtherFormError
from sffx.compiler.trace.state import Attributes
from sffx.compiler.trace.tracer import GuidedTracer
from sffx.compiler.trace.writes import versions
from sffx.errors import TraceError, backbone_hint, failure_in_words, has_parts, location

# Makes a tracer for train mode, if given True, or for eval mode.
MakeTracer = Callable[[bool], GuidedTracer]


def trace_until_it_works(
    probe: nn.Module, make_tracer: MakeTracer, leaves: dict[str, str], attributes: Attributes
) -> tuple[GuidedTracer, fx.Graph]:
    """Return the tracer and the graph of the first attempt that holds for both modes.

    Args:
        probe: the model on fake tensors.
        make_tracer: which stops at `leaves`.
        leaves: the reasons why modules are leaves, by qualname; to write to.
        attributes: of the modules, before anything ran.

    Raises:
        TraceError: the forward of the model itself cannot be traced.
    """
    while True:
        attributes.restore()
        tracer = make_tracer(True)
        graph = _attempt(probe, tracer, leaves)
        if graph is None or tracer.has_opened or _buffers_were_assigned(probe, leaves, attributes):
            continue
        if not tracer.branched:
            return tracer, graph
        attributes.restore()
        eval_tracer = make_tracer(False)
        try:
            eval_graph = _attempt(probe, eval_tracer, leaves)
        except TraceError as failure:
            raise _in_eval_mode(failure) from failure
        if eval_graph is None or eval_tracer.has_opened:
            continue
        if merge_modes(graph, eval_graph, tracer.branched, probe):
            tracer.constants.names.update(eval_tracer.constants.names)
            return tracer, graph
        if "" in tracer.branched:
            raise TraceError(
                f"{type(probe).__name__}.forward computes its logits differently in train and eval "
                "mode, by a branch on self.training, which a graph cannot hold. "
                "Hint: move the branch into a submodule, or pass training=self.training to a "
                "function"
            )
        leaves.update(dict.fromkeys(tracer.branched, "branches on self.training"))


def _attempt(probe: nn.Module, tracer: GuidedTracer, leaves: dict[str, str]) -> fx.Graph | None:
    """Trace once.

    Returns:
        The graph; None if it failed and the next attempt goes another way. The function where it
        failed was then added to those that the graph calls, or the class of the submodule to
        `leaves`.

    Raises:
        TraceError: the model itself failed, or its output is no logits.
    """
    try:
        graph = traced_once(probe, tracer)
        place_constants(graph, tracer.constants.names)
        task, notes = keep_logits(graph, probe, tracer.wanted, tracer.place_of_logits)
        tracer.task = task
        tracer.notes_on_task += notes
    except TraceError:
        raise
    except Exception as failure:
        # The next attempt opens a layer, or replaces a builtin, so no leaf is needed yet.
        if tracer.has_opened or tracer.functions.asked.take_new():
            return None
        if tracer.functions.add(failure, _reason(failure)):
            return None
        if not tracer.failed:
            _require_other_batch_size(probe, tracer, failure)
            has_tried = tracer.functions.has_tried(failure)
            raise _root_failed(probe, failure, has_tried) from failure
        kind = type(probe.get_submodule(tracer.failed))
        add_leaves(leaves, probe, kind, _reason(failure))
        return None
    return graph


def _in_eval_mode(failure: TraceError) -> TraceError:
    """Return the error of a model that could be traced in train mode, and not in eval mode."""
    problem, _, hint = str(failure).partition(" Hint: ")
    return TraceError(f"in eval mode, {problem} Hint: return the same in both modes; or {hint}")


def traced_once(probe: nn.Module, tracer: GuidedTracer) -> fx.Graph:
    """Return the graph of one trace, which returns the logits and whatever else it computes."""
    try:
        before = versions(probe)
        with tracer.patches.applied(), HeldTensors(tracer):
            # A patch may have replaced an attribute of a layer, as the `apply` of a function.
            tracer.own.note(probe)
            graph = call_without_draws(lambda: tracer.trace(probe))
        tracer.writes.require_seen(before)
        _require_own_parameters(probe, tracer)
        tracer.tensors_left = tensors_left(probe)
        return graph
    finally:
        tracer.constants.close()


def _require_own_parameters(probe: nn.Module, tracer: GuidedTracer) -> None:
    """Raise a TraceError if a forward has put another tensor in the place of a parameter."""
    name = tracer.own.assigned_parameter(probe)
    if name:
        raise TraceError(
            f"{type(probe).__name__} assigns its parameter {name!r} in its forward, which a graph "
            "cannot hold. Hint: torch.func.functional_call(layer, tensors, x) calls a layer with "
            "other tensors, and leaves it as it is"
        )


def _reason(failure: Exception) -> str:
    """Return what failed, in words of the model, and where."""
    # C code names the class of what it was given.
    is_of_list = isinstance(failure, TypeError) and _LISTED.search(str(failure))
    # The other one is raised by `weights[task[0]]`.
    if is_of_list or isinstance(failure, DataDependentOutputException):
        return f"{READS_A_NUMBER} ({location(failure)})"
    return _PROXY.sub("a traced value", failure_in_words(failure))


_PROXY = re.compile(r"'?(Guided|Sequence|Tensor)Proxy'?")
_LISTED = re.compile(r"\bListed\b")


def _root_failed(probe: nn.Module, failure: Exception, is_of_function: bool) -> TraceError:
    """Return the error for a failure in the forward of the model itself.

    Args:
        probe: the model.
        failure: of the trace.
        is_of_function: whether the code is in a function that the graph could not call.
    """
    if isinstance(failure, OtherFormError):
        hint = "return the same in both modes, and keep the rest in an attribute"
        return TraceError(f"{failure}. Hint: {hint}")
    hint = ""
    if _PROXY.search(str(failure)):
        hint = "torch.zeros and x.new_zeros take traced sizes, and a tuple of them is a shape; or "
    hint += "move this code into a submodule, which then becomes a leaf"
    if not is_of_function:
        hint += ", or into a function of the file, which the graph then calls"
    if has_parts(probe):
        hint += f"; {backbone_hint(probe)}"
    return TraceError(f"{type(probe).__name__} cannot be traced: {_reason(failure)}. Hint: {hint}")


def _require_other_batch_size(probe: nn.Module, tracer: GuidedTracer, failure: Exception) -> None:
    """Raise a TraceError if a model takes one batch size only, and so cannot be traced."""
    size, other = tracer.runner.sizes
    if not tracer.runner.takes(size) or tracer.runner.takes(other):
        return
    raise TraceError(
        f"{type(probe).__name__} runs with {size} samples, the first axis of its inputs, and not "
        f"with {other}: {_reason(failure)}. Hint: the first axis of each input is the batch, whose "
        "size a forward reads off x.shape[0]; wrap a model whose inputs have the steps first, "
        "def forward(self, x): return self.model(x.transpose(0, 1))"
    ) from failure


def _buffers_were_assigned(
    probe: nn.Module, leaves: dict[str, str], attributes: Attributes
) -> bool:
    """Whether a forward has put a traced value in the place of a buffer; its class becomes leaves.

    The graph would compute the value, and assign nothing.

    Raises:
        TraceError: the forward of the model itself has done it.
    """
    found = False
    for qualname, module in list(probe.named_modules()):
        buffer = _assigned_buffer(module, attributes.buffers_of(module))
        if not buffer:
            continue
        if not qualname:
            raise TraceError(
                f"{type(probe).__name__}.forward assigns its buffer {buffer!r}, which a graph "
                f"cannot hold. Hint: write into the buffer, self.{buffer}.copy_(...), or move this "
                "into a submodule, which then becomes a leaf"
            )
        add_leaves(leaves, probe, type(module), f"assigns its buffer {buffer!r}")
        found = True
    return found


def _assigned_buffer(module: nn.Module, before: Mapping[str, Any]) -> str:
    """Return the name of the first buffer that is another tensor than before, "" where none is.

    `self.steps += 1` writes into the buffer, and assigns the same one again.
    """
    for name, value in module._buffers.items():
        if isinstance(value, fx.Proxy) and facts(value.node).example is not before.get(name):
            return name
    return ""
