"""Trace a model into an fx graph whose every node carries an example value, on fake tensors.

The example values answer what a plain trace cannot (`bool`, `len`, `iter`), while shapes stay
symbolic. `self.training` stays symbolic too, so train() and eval() of the result act as they do on
the original.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sffx.arguments import Arguments
from sffx.blocks import Input, Leaf
from sffx.compiler.aliases import views_in_attributes
from sffx.compiler.batch_axis import BATCH_SIZES, batch_sizes
from sffx.compiler.caches import caches_restored
from sffx.compiler.examples import example_arguments, runs, try_call
from sffx.compiler.fake import CountingWrites, fake_copy_but_constants
from sffx.compiler.trace.attempts import trace_until_it_works, traced_once
from sffx.compiler.trace.constants import ADDED_CONSTANT
from sffx.compiler.trace.flags import add_module, is_added
from sffx.compiler.trace.functions import Functions
from sffx.compiler.trace.inputs import input_records
from sffx.compiler.trace.kept_state import set_outside
from sffx.compiler.trace.leaves import add_leaves_of_modules, leaf_records, leaves_by_hooks
from sffx.compiler.trace.mode_attributes import make_leaves_by_mode
from sffx.compiler.trace.notes import notes
from sffx.compiler.trace.outputs import Wanted
from sffx.compiler.trace.randomness import generators_restored
from sffx.compiler.trace.requirements import require_plain
from sffx.compiler.trace.runner import Example, NodeRunner
from sffx.compiler.trace.single_samples import KEPT, keep_batch_axes
from sffx.compiler.trace.sizes import (
    Values,
    drop_idle_guards,
    is_complete,
    is_guard,
    note_resized,
    other_arguments,
    refused,
)
from sffx.compiler.trace.state import Attributes, Kept, counters, kept_tensors, set_once
from sffx.compiler.trace.tracer import GuidedTracer
from sffx.errors import InputError, TraceError
from sffx.tasks import CLASSIFICATION, Task
from sffx.tensors import copied

# Threads trace one after the other: while a trace runs, functions of torch are replaced.
_TRACING = threading.RLock()


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        root: a copy of the model, which owns every module and tensor that the graph names.
        graph: of the whole model; `facts(node)` is the record of each of its nodes.
        inputs: the placeholders, as traced.
        arguments: in which they lie.
        leaves: modules with children that could not be traced.
        notes: what was noticed on the way.
        task: what the model predicts.
        batch_size: of the examples; each node has run at another one as well.
        output_keys: the keys and indices that lead to the output in what the model returns.
    """

    root: nn.Module
    graph: fx.Graph
    inputs: tuple[Input, ...]
    arguments: Arguments
    leaves: tuple[Leaf, ...]
    notes: tuple[str, ...]
    task: Task = CLASSIFICATION
    batch_size: int = BATCH_SIZES[0]
    output_keys: tuple[Any, ...] = ()


def trace(
    model: nn.Module,
    example_input: Any = None,
    num_classes: int | None = None,
    task: Task | None = None,
    earlier_notes: tuple[str, ...] = (),
) -> Trace:
    """Trace a copy of a model. The model itself is not touched and nothing is computed.

    Args:
        model: any module whose output holds logits of shape (B, J).
        example_input: a tensor, a tuple of positional or a mapping of keyword arguments; None to
            infer it.
        num_classes: J, which tells the logits among several outputs.
        task: what the model predicts; None to infer it from the output.
        earlier_notes: what was noticed before.

    Raises:
        InputError: the input cannot be inferred, or the example does not fit.
        TraceError: the top-level `forward` cannot be traced.
    """
    require_plain(model)
    # With gradients, whatever the caller has switched off: a region without them is noticed.
    with _TRACING, torch.enable_grad(), generators_restored(), caches_restored(model):
        traced = _trace(model, example_input, Wanted(num_classes, task))
    return replace(traced, notes=(*earlier_notes, *traced.notes))


@dataclass(frozen=True)
class _Probed:
    """A copy of a model on fake tensors that has run, and what its calls have shown.

    Attributes:
        root: a copy with the real tensors, which the graph will own.
        probe: the copy on fake tensors, in train mode.
        mode: in which the fake tensors live.
        form: the arguments of the model.
        values: of its inputs, by name.
        run: runs the probe.
        before: its attributes before its first call.
        leaves: the reasons why modules are leaves, by qualname; a trace adds to them.
        kept: what a call keeps for the next one.
        flags: the modules with a number that the first call sets, and what it is called.
        opened: the modules whose state is set while they do not run, and the attribute's name; a
            trace adds to them.
        views: the tensors in plain attributes that share memory with a parameter or a buffer.
    """

    root: nn.Module
    probe: nn.Module
    mode: FakeTensorMode
    form: Arguments
    values: dict[str, Any]
    run: Callable[[], Any]
    before: Attributes
    leaves: dict[str, str]
    kept: Kept
    flags: Mapping[nn.Module, str]
    opened: dict[nn.Module, str]
    views: Mapping[str, Tensor]


def _probed(model: nn.Module, example_input: Any) -> _Probed:
    """Run a copy of a model on fake tensors, several times."""
    mode = CountingWrites(allow_non_fake_inputs=True)
    root = _copy(model)
    probe = fake_copy_but_constants(model, mode).train()
    before = Attributes(probe)
    # This runs the probe for the first time. What follows compares with `before`.
    form, values = example_arguments(probe, example_input, mode, root)
    _require_all_parameters(model, probe)
    run = partial(try_call, probe, form, values)
    kept = kept_tensors(probe, run, before)
    flags = set_once(probe, before)
    leaves: dict[str, str] = {}
    _make_leaves_of_counters(probe, run, before, leaves, kept.carried)
    leaves.update(leaves_by_hooks(probe))
    make_leaves_by_mode(probe, leaves)
    opened = set_outside(probe, run, before)
    views = views_in_attributes(model)
    return _Probed(root, probe, mode, form, values, run, before, leaves, kept, flags, opened, views)


def _trace(model: nn.Module, example_input: Any, wanted: Wanted) -> Trace:
    """Return the trace of a model that can be traced, by attempts; see `trace`."""
    probed = _probed(model, example_input)
    functions = Functions()

    def make_tracer(training: bool) -> GuidedTracer:
        example = Example(probed.form, probed.values)
        runner = NodeRunner(probed.mode, probed.probe, probed.root, example, training=training)
        return GuidedTracer(runner, probed.leaves, functions, wanted, probed.opened, probed.views)

    tracer, graph = trace_until_it_works(probed.probe, make_tracer, probed.leaves, probed.before)
    if probed.flags:
        _require_same_later(probed, make_tracer)
    if tracer.resized:
        probed.before.restore()
        in_eval_mode = make_tracer(False).runner.values_on(graph, probed.values)
        _require_same_decisions(graph, in_eval_mode, tracer.resized)
    # The trace may have left traced values on modules, which the next runs must not read.
    probed.before.restore()
    others = list(_at_other_sizes(graph, probed, partial(tracer.runner.values_on, graph)))
    note_resized(graph, others)
    is_of_size = drop_idle_guards(graph, others)
    _add_constants_and_flags(probed.root, probed.probe, graph, list(tracer.constants.names))
    notes_on_batch = [KEPT] if keep_batch_axes(graph) else []
    return Trace(
        root=probed.root,
        graph=graph,
        inputs=input_records(graph, probed.root, probed.form.names),
        arguments=probed.form,
        leaves=leaf_records(probed.root, probed.leaves),
        notes=(
            *tracer.notes_on_task,
            *functions.notes(graph),
            *_notes(probed, tracer, graph, is_of_size),
            *notes_on_batch,
        ),
        task=tracer.task,
        batch_size=batch_sizes(probed.values)[0],
        output_keys=tracer.keys_of_logits,
    )


def _notes(
    probed: _Probed, tracer: GuidedTracer, graph: fx.Graph, is_of_size: bool
) -> Iterator[str]:
    return notes(
        probed.root,
        graph,
        constants=probed.form.constants,
        kept=probed.kept.once,
        left_behind=tracer.tensors_left,
        checkpointed=tracer.patches.checkpointed,
        unvalidated=tracer.patches.unvalidated,
        left_out=tracer.regions.left_out,
        checks=tracer.settled.checks.left_out,
        asked=tracer.regions.asked,
        is_of_size=is_of_size,
    )


def _require_all_parameters(model: nn.Module, probe: nn.Module) -> None:
    """Raise an InputError if a forward makes parameters.

    Args:
        model: that has not run.
        probe: a copy whose forward has run.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, _ in probe.named_parameters(remove_duplicate=False):
        if name not in known:
            raise InputError(
                f"{name!r} is made in the first call of the model. Hint: run the model once, "
                "model(x)"
            )


def _require_same_later(probed: _Probed, make_tracer: Callable[[bool], GuidedTracer]) -> None:
    """Raise a TraceError if a model does something else in its second call than in its first."""
    calls = []
    with suppress(Exception):  # the second call may read a tensor that the first one keeps
        for is_later in (False, True):
            probed.before.restore()
            if is_later:
                probed.run()
            graph = traced_once(probed.probe, make_tracer(True))
            calls.append([node.target for node in graph.nodes])
    if len(calls) < 2 or calls[0] == calls[1]:
        return
    module, name = next(iter(probed.flags.items()))
    raise TraceError(
        f"{type(module).__name__} does something else in its first call, where it sets its "
        f"attribute {name!r}, and a graph does the same in each. Hint: run the model once before "
        "the cut, model(x)"
    )


def _require_same_decisions(graph: fx.Graph, values: Values, resized: str) -> None:
    """Raise a TraceError if a decision by a size is another one in eval mode.

    Args:
        graph: traced in train mode.
        values: of its nodes in eval mode.
        resized: the class of a module that returns other sizes there.
    """
    if refused(graph, values):
        raise TraceError(
            f"{resized} returns other sizes in eval mode than in train mode, and the "
            "forward takes a decision or a plain number from a size, which a graph would freeze. "
            "Hint: compute with x.shape as it is, without int() and branches"
        )


def _at_other_sizes(
    graph: fx.Graph, probed: _Probed, run: Callable[[dict[str, Any]], Values]
) -> Iterator[Values]:
    """Yield the values of a graph's nodes at other sizes of the inputs: three if it has guards.

    Args:
        graph: that was traced.
        probed: the model. A graph without guards tells as well whether the model runs there.
        run: returns the values of the nodes on other inputs, as far as the graph runs there.
    """
    others = other_arguments(probed.values, probed.mode)
    # All of these are lazy: no size is tried once there are enough.
    if any(map(is_guard, graph.nodes)):
        taken = filter(partial(runs, probed.probe, probed.form), others)
        yield from map(run, islice(taken, 3))
    else:
        complete = filter(partial(is_complete, graph), map(run, others))
        yield from islice(complete, 1)


def _make_leaves_of_counters(
    probe: nn.Module,
    run: Callable[[], Any],
    before: Attributes,
    leaves: dict[str, str],
    carried: Mapping[nn.Module, str],
) -> None:
    """Make leaves of the modules whose calls change what the next one reads.

    Raises:
        TraceError: the model itself is one.
    """
    found = {}
    for module, name in {**counters(probe, run, before), **carried}.items():
        found[module] = f"changes {name} at each call"
    add_leaves_of_modules(leaves, probe, found)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as cause:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {cause}. "
            "Hint: it keeps something as an attribute that copy.deepcopy refuses, such as a "
            "lock, a generator or a sparse CSR tensor; keep that outside the model"
        ) from cause


def _add_constants_and_flags(
    root: nn.Module, probe: nn.Module, graph: fx.Graph, constants: list[str]
) -> None:
    """Give the copy of the model the constants and the training flags that the graph reads."""
    for node in graph.nodes:
        if is_added(node):
            add_module(root, node)
        if node.op == "get_attr" and node.target in constants:
            value = getattr(probe, str(node.target))
            node.target = f"{ADDED_CONSTANT}{constants.index(node.target)}"
            _add_constant(root, node.target, value)


def _add_constant(root: nn.Module, name: str, value: Tensor) -> None:
    """Give the copy of the model a tensor that the forward made."""
    if name in root._buffers:
        return
    if isinstance(value, FakeTensor):
        raise TraceError(
            f"{type(root).__name__} computes a constant, of shape {tuple(value.shape)}, from what "
            "has no values in a trace. "
            "Hint: register the tensor that it is made of by self.register_buffer"
        )
    # A clone: the forward may keep the tensor for itself, in a cache.
    root.register_buffer(name, value.detach().clone(), persistent=False)
