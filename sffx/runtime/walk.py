"""Walk over the stages of a cut model: run one after the other and stop at each one's scores.

This is the only walker. Training, evaluation, verification, early exit and memory counting differ
in what they do between two stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from sffx.errors import InputError
from sffx.inputs import batch_size, bind, explaining_input_errors
from sffx.net import plan_of
from sffx.runtime.compiled import Compilation, compilation_of
from sffx.runtime.cut_values import (
    CutValues,
    explaining_cached_errors,
    last_frozen,
    node_values,
)
from sffx.runtime.find_residency import residency_of
from sffx.runtime.modes import evaluating
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, Values, placeholders_of, stages_of


class Runs(Protocol):
    """A stage of any kind, as a walk sees it."""

    def score(self, values: Any) -> Tensor:
        """Run on the values that it reads, add its own, and return the scores, (B, J)."""
        ...

    def hand_on(self, values: Any) -> None:
        """Add what the next stage reads."""
        ...


S = TypeVar("S", bound=Runs)


def walk(
    net: fx.GraphModule,
    x: Any,
    only: Collection[str] | None = None,
    *,
    held: Values | None = None,
    score: Callable[[Stage, Values], Any] | None = None,
) -> Iterator[tuple[Stage, Any]]:
    """Yield each stage of a cut model with its scores, (B, J); the classifier's logits come last.

    The scores hold the stage's own autograd graph and nothing else holds it. So the activations of
    a stage are freed when the caller has let go of its scores, before the next stage runs.

    Args:
        net: what `transform` returned.
        x: its input, as `sffx.inputs.bind` takes it, or values at a cut.
        only: names of the stages to yield, all if None. The other stages before the last of these
            only pass their values on: in eval mode, without gradients and without their heads. The
            stages behind the last one do not run.
        held: an empty dictionary, in which the caller sees the values that the walk holds.
        score: runs a stage, and returns what is yielded with it; `score_detached` if None.

    Raises:
        InputError: x does not fit the model.
    """
    run = score or partial(_scores, compilation_of(net))
    first, inputs, own_values = _beginning(net, x)
    values: Values = {} if held is None else held
    values.update(own_values)
    if plan_of(net).objective.makes_views:
        # Nobody else holds the views, which are freed when the last stage that reads them has run.
        inputs = _without_memory(inputs)
        del x, own_values
    stages = _until_the_last(stages_of(net), only)[first:]
    residency = residency_of(net)
    for stage, following in zip_longest(stages, stages[1:]):
        residency.enter(stage, following)
        if only is not None and stage.name not in only:
            with _explaining(net, inputs):
                pass_through(net, stage, values)
            continue
        # No local name may hold the scores: the caller decides when they are freed.
        yield stage, _explained(run, net, stage, inputs, values)
        # With `only`, nothing behind the last stage reads what it would hand on.
        if only is not None and stage is stages[-1]:
            return
        with _explaining(net, inputs):
            stage.hand_on(values)


def run_blocks(net: fx.GraphModule, inputs: Mapping[str, Any], last: int) -> None:
    """Run the feature blocks up to one, in eval mode, without gradients and without their heads.

    Args:
        net: what `transform` returned.
        inputs: by name.
        last: index of the last block that runs.

    Raises:
        InputError: the inputs do not fit the model.
    """
    batch_size(inputs)  # for its error: there is no tensor
    _run_through(net, stages_of(net)[: last + 1], inputs, input_values(net, inputs))


def run_frozen(net: fx.GraphModule, x: Any, last: Stage) -> Values:
    """Return the values behind a stage, where neither it nor an earlier one learns.

    They are those of a walk whose `only` names later stages.

    Args:
        net: what `transform` returned.
        x: its input, as for `walk`.
        last: the stage.

    Raises:
        InputError: x does not fit the model, or is of a later cut; or the net is offloaded,
            replicated or sharded.
    """
    _require_on_device(net)
    first, inputs, values = _beginning(net, x)
    if first > last.index:
        raise InputError(
            f"x holds values that were cached behind {last.name}. Hint: pass values of an earlier "
            "block, or the model's own input"
        )
    _run_through(net, stages_of(net)[first : last.index + 1], inputs, values)
    return values


def _run_through(
    net: fx.GraphModule, stages: Sequence[Stage], inputs: Mapping[str, Any], values: Values
) -> None:
    """Run stages that only pass their values on; what they hand on is added to the values."""
    residency = residency_of(net)
    for stage, following in zip_longest(stages, stages[1:]):
        residency.enter(stage, following)
        with _explaining(net, inputs):
            pass_through(net, stage, values)


def _beginning(net: fx.GraphModule, x: Any) -> tuple[int, Mapping[str, Any], Values]:
    """Return the first stage to run, by its index, and the values of x by name and by node."""
    if isinstance(x, CutValues):
        _require_on_device(net)
        last = last_frozen(net, x)
        return last.index + 1, x, node_values(net, x, last)
    inputs = bind(plan_of(net), x)
    batch_size(inputs)  # for its error: x holds no tensor
    return 0, inputs, input_values(net, inputs)


def _without_memory(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs that have the shapes, dtypes and devices of others, for messages.

    Only floats lose their values. Messages tell the range of integers.
    """
    described: dict[str, Any] = {}
    for name, value in inputs.items():
        is_of_floats = isinstance(value, Tensor) and value.is_floating_point()
        described[name] = value.new_empty(()).expand(value.shape) if is_of_floats else value
    return described


def _require_on_device(net: fx.GraphModule) -> None:
    if type(residency_of(net)) is not Residency:
        raise InputError(
            "a net that is offloaded, replicated or sharded has no cached values. "
            "Hint: train it without a cache, or call sffx.onload(net)"
        )


def walk_attached(stages: Sequence[S], values: Any) -> Iterator[tuple[S, Tensor]]:
    """Yield each stage with its scores, and leave the values attached to their autograd graph.

    Only the detaches in the model's own graph cut gradients. The caller holds the values, and may
    look at them or change them between two stages.

    Args:
        stages: of one cut model, in order; or of another kind with these two methods, such as the
            files of an early exit.
        values: of the model's inputs, as `input_values` returns them, or as that kind takes them.
    """
    for stage in stages:
        yield stage, stage.score(values)
        stage.hand_on(values)


def input_values(net: fx.GraphModule, inputs: Mapping[str, Any]) -> Values:
    """Return the values of a model's inputs by their nodes, given them by name."""
    return {node: inputs[name] for name, node in placeholders_of(net).items()}


def _until_the_last(stages: Sequence[Stage], only: Collection[str] | None) -> Sequence[Stage]:
    """Return the stages up to the last one with one of these names."""
    if only is None:
        return stages
    named = [stage.index for stage in stages if stage.name in only]
    return stages[: max(named, default=-1) + 1]


def pass_through(net: fx.GraphModule, stage: Stage, values: Values) -> None:
    """Run a stage that only passes its values on."""
    parts = [*stage.modules, *stage.norms]
    residency = residency_of(net)
    with torch.no_grad(), evaluating(*parts):
        if residency.heads_run_always:
            stage.score(values)
        else:
            stage.run_block(values)
        stage.hand_on(values)
    residency.release(stage, changed=False)


def _explained(
    run: Callable[[Stage, Values], Any],
    net: fx.GraphModule,
    stage: Stage,
    inputs: Mapping[str, Any],
    values: Values,
) -> Any:
    block = stage.plan
    place = block.target if block.name == block.target else f"{block.target} ({block.name})"
    with _explaining(net, inputs, place):
        return run(stage, values)


def _explaining(
    net: fx.GraphModule, inputs: Mapping[str, Any], *place: str
) -> AbstractContextManager[None]:
    """Return a context that explains torch's errors by the input, or by values at a cut."""
    if isinstance(inputs, CutValues):
        return explaining_cached_errors(net, inputs)
    return explaining_input_errors(net, inputs, *place)


def _scores(compilation: Compilation | None, stage: Stage, values: Values) -> Tensor:
    """Return the scores of a stage, by its compiled block where there is one."""
    scores = None if compilation is None else compilation.score(stage, values)
    return score_detached(stage, values) if scores is None else scores


def score_detached(stage: Stage, values: Values) -> Tensor:
    """Run a stage's block and head, and return its scores, (B, J), which alone hold its graph.

    Args:
        stage: to run.
        values: that it reads. What the block computed is added, detached.
    """
    scores = stage.score(values)
    # No value may carry the graph of this stage on to the next stages.
    for node, value in values.items():
        is_tensor = isinstance(value, Tensor)  # as most are, and a map over a tree takes time
        values[node] = value.detach() if is_tensor else tree_map_only(Tensor, Tensor.detach, value)
    return scores
