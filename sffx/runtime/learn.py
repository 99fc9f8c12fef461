"""Learn block by block: each block's loss and gradients, as soon as they can be computed.

This is the one loop behind `local_loss`, `block_losses` and `local_step`. They differ in what they
do with the gradients of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from sffx.blocks import BlockPlan
from sffx.checks import require_block_names, require_callable
from sffx.errors import InputError
from sffx.inputs import batch_size, bind, targets_of
from sffx.kernels.entropy import SharedCrossEntropy, private_scores
from sffx.kernels.precision import widened
from sffx.learning.losses import (
    LossFunction,
    LossFunctions,
    block_loss,
    check_targets,
    explaining_loss,
    loss_functions,
    require_device_of,
    shared_entropy,
)
from sffx.net import plan_of, require_uncompiled
from sffx.runtime.compiled import Compilation, Computed, compilation_of
from sffx.runtime.cut_values import CutValues, last_frozen
from sffx.runtime.gradients import Gradients, hooks_held_back, mark_gradients
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, Values, stages_of, stages_that_learn
from sffx.runtime.views import losses_of, require_no_loss, training_input
from sffx.runtime.walk import score_detached, walk

# Called with the name of a block, its scores, (B, J), and its loss, a scalar, both detached.
OnBlock: TypeAlias = Callable[[str, Tensor, Tensor], object]


@dataclass(frozen=True)
class Learned:
    """One stage's loss, a detached scalar, and the gradients of its parameters."""

    stage: Stage
    loss: Tensor
    gradients: Gradients


def learn(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    loss_fn: LossFunctions | None,
    residency: Residency,
    *,
    only: Collection[str] | None,
    on_block: OnBlock | None,
    hooks_wait: bool,
) -> Iterator[Learned]:
    """Yield each stage's loss and gradients when its activations are freed, before the next runs.

    Args:
        net: as for `local_loss`.
        x: as for `local_loss`.
        y: as for `local_loss`.
        loss_fn: as for `local_loss`.
        residency: of the net.
        only: names of the blocks that learn, as `blocks_to_learn` returns them; all if None.
        on_block: called with each block's name, scores and loss, if given.
        hooks_wait: whether hooks of parameters are held back, because a later backward pass hands
            the gradients over and runs the hooks.
    """
    plan = plan_of(net)
    require_uncompiled(net)
    require_train_mode(net)
    if on_block is not None:
        require_callable("on_block", on_block, ("name", "scores", "loss"))
    stages = learning_stages(net, only)
    only = _names_to_walk(net, stages, only)
    functions = loss_functions(loss_fn, len(plan.all_blocks))
    functions_in_use = [functions[stage.index] for stage in stages]
    samples = _samples(plan, x)
    check_targets(y, samples, plan.num_classes, functions_in_use, plan.task)
    require_no_loss(plan.objective, loss_fn)
    plan.objective.check_targets(y, samples, plan.num_classes)
    if not isinstance(x, CutValues):
        # Cached targets have no padding any more.
        y = targets_of(plan, x, y)
    functions = losses_of(plan, functions)
    # Before any stage runs: sharding puts gathered parameters in the place of the model's own.
    entropy = shared_entropy(y, plan.task)
    lessons = {}
    for stage in stages:
        function = functions[stage.index]
        lessons[stage] = Lesson(stage.trainable, function, on_block, hooks_wait, entropy)
    run = partial(_computed, compilation_of(net), lessons, y)
    # No name holds the views: their memory is free when no stage reads them any more.
    for stage, computed in walk(net, training_input(net, x, y), only, score=run):
        if isinstance(computed, Computed):
            yield _learned(stage, computed, lessons[stage])
            continue
        held = [computed]
        # Nothing but the list may hold the scores, since they hold the activations of the stage.
        del computed
        yield learn_stage(stage, held, y, lessons[stage], residency)


def _computed(
    compilation: Compilation | None,
    lessons: dict[Stage, Lesson],
    y: Tensor,
    stage: Stage,
    values: Values,
) -> Computed | Tensor:
    """Return what a compiled stage computed, or the scores of one that is not compiled."""
    if compilation is not None:
        lesson = lessons[stage]
        computed = compilation.learn(stage, values, y, lesson.loss_fn, lesson.parameters)
        if computed is not None:
            return computed
    return score_detached(stage, values)


def _learned(stage: Stage, computed: Computed, lesson: Lesson) -> Learned:
    """Return what a compiled stage has learnt."""
    if lesson.on_block is not None:
        lesson.on_block(stage.name, computed.scores, computed.loss)
    mark_gradients(computed.gradients.values())
    return Learned(stage, computed.loss, computed.gradients)


@dataclass(frozen=True)
class Lesson:
    """How one stage learns from a batch.

    Attributes:
        parameters: of the stage, those that learn.
        loss_fn: of the stage, None for cross-entropy.
        on_block: called with the stage's name, scores and loss, if given.
        hooks_wait: whether hooks of parameters are held back, because a later backward pass hands
            the gradients over and runs the hooks.
        entropy: cross-entropy that all blocks share, where there is no `loss_fn`; None for the loss
            of the task.
    """

    parameters: list[nn.Parameter]
    loss_fn: LossFunction | None
    on_block: OnBlock | None
    hooks_wait: bool
    entropy: SharedCrossEntropy | None = None


def learn_stage(
    stage: Stage, held: list[Tensor], y: Tensor, lesson: Lesson, residency: Residency
) -> Learned:
    """Return the loss and the gradients of a stage that has run; its activations are freed.

    Args:
        stage: that has run.
        held: its scores, (B, J), in a list of one. They are taken out, so that the caller does not
            hold the activations.
        y: targets of the batch.
        lesson: how the stage learns.
        residency: of the net.

    Raises:
        InputError: the loss hands gradients to something else than the scores, or the scores have
            a gradient but no parameter does.
    """
    scores = held.pop()
    differentiated = _differentiated(stage, scores, y, lesson)
    loss = differentiated.loss
    if lesson.on_block is not None:
        lesson.on_block(stage.name, scores.detach(), loss.detach())
    # A frozen stage has scores without a graph, and so has every stage under torch.no_grad().
    learns = scores.requires_grad
    # Cross-entropy with labels that need no gradient depends on nothing but the scores.
    has_other_leaves = lesson.loss_fn is not None or y.requires_grad
    if has_other_leaves:
        _require_own(loss, scores)
    # Nothing but the loss may hold the activations, or they outlive the backward pass.
    del scores
    gradients: Gradients = {}
    if learns:
        gradients = _stage_gradients(differentiated, lesson, residency)
        if not gradients:
            raise _nothing_learned(stage, len(lesson.parameters))
    return Learned(stage, loss.detach(), gradients)


@dataclass(frozen=True)
class _Differentiated:
    """A loss, and the value from which its backward pass starts.

    Attributes:
        loss: a scalar.
        start: the loss itself, or the scores, which then hold the autograd graph.
        gradient: of the loss by `start`; None for 1.
    """

    loss: Tensor
    start: Tensor
    gradient: Tensor | None = None


def _differentiated(stage: Stage, scores: Tensor, y: Tensor, lesson: Lesson) -> _Differentiated:
    """Return the loss of a stage, and where its backward pass starts."""
    if lesson.loss_fn is not None or lesson.entropy is None:
        is_seen = lesson.on_block is not None or lesson.loss_fn is not None
        is_private = not is_seen and not stage.scores_are_seen
        with private_scores(is_private), explaining_loss(stage.name, scores, y):
            loss = block_loss(scores, y, lesson.loss_fn, stage.task)
        _require_gradient(loss, scores, stage)
        return _Differentiated(loss, loss)
    require_device_of(scores, y)
    logits = widened(scores)
    loss, gradient = lesson.entropy(logits.detach())
    return _Differentiated(loss, logits, gradient)


def _require_gradient(loss: Tensor, scores: Tensor, stage: Stage) -> None:
    """Raise an InputError if a loss does not depend on the scores, so that nothing is learnt."""
    if scores.requires_grad and not loss.requires_grad:
        raise InputError(
            f"the loss that loss_fn returned for {stage.name} carries no gradient. Hint: compute "
            "it from the goodness, without detach(), argmax() or torch.no_grad(); or leave the "
            "block out, by blocks=[...]"
        )


def _stage_gradients(
    differentiated: _Differentiated, lesson: Lesson, residency: Residency
) -> Gradients:
    """Return the gradients of a stage's loss by parameter; the loss's graph is freed."""
    waiting: AbstractContextManager[None] = nullcontext()
    if lesson.hooks_wait:
        waiting = hooks_held_back(each._backward_hooks for each in lesson.parameters)
    with waiting:
        gradients = residency.gradients(
            differentiated.start, lesson.parameters, differentiated.gradient
        )
    mark_gradients(gradients.values())
    return gradients


def learning_stages(net: fx.GraphModule, only: Collection[str] | None) -> list[Stage]:
    """Return the stages that learn in a step.

    Args:
        net: what `transform` returned.
        only: names of blocks, all if None.

    Raises:
        InputError: a block is not there, or none is named.
    """
    stages = stages_that_learn(net)
    if only is None:
        return stages
    require_block_names(only, [stage.name for stage in stages])
    return [stage for stage in stages if stage.name in only]


def blocks_to_learn(
    net: fx.GraphModule, x: Any, blocks: Collection[str] | None
) -> Collection[str] | None:
    """Return the names of the blocks that learn from an input, None for all.

    Args:
        net: what `transform` returned.
        x: its input, or values at a cut.
        blocks: names of blocks; None for all, which are those behind the cut.

    Raises:
        InputError: a block lies before the values, or x is of no cut of this net.
    """
    if not isinstance(x, CutValues):
        return blocks
    last = last_frozen(net, x)
    if blocks is None:
        return [stage.name for stage in learning_stages(net, None) if stage.index > last.index]
    early = [stage.name for stage in learning_stages(net, blocks) if stage.index <= last.index]
    if early:
        raise InputError(
            f"{', '.join(early)} cannot learn from values that were cached after {last.name}. "
            "Hint: pass the model's own input, or blocks=[...] of later blocks alone"
        )
    return blocks


def _names_to_walk(
    net: fx.GraphModule, stages: list[Stage], only: Collection[str] | None
) -> Collection[str] | None:
    """Return the names of the stages to walk over, None for all of them."""
    if only is None and len(stages) < len(stages_of(net)):
        return [stage.name for stage in stages]
    return only


def require_train_mode(net: fx.GraphModule) -> None:
    """Raise an InputError if a model is in eval mode."""
    if not net.training:
        raise InputError(
            "the model is in eval mode, where it returns scores. "
            "Hint: call net.train() before a training step"
        )


def _samples(plan: BlockPlan, x: Any) -> int:
    """Return the batch size of an input that a block-local step can take.

    Raises:
        InputError: the input requires a gradient, which the step would not compute.
    """
    values = x if isinstance(x, CutValues) else bind(plan, x)
    samples = batch_size(values)
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    wants_gradient = any(tensor.requires_grad for tensor in tensors)
    if wants_gradient and torch.is_grad_enabled():
        raise InputError(
            "x requires gradient, but a block-local step hands none on to its input. "
            "Hint: pass x.detach(), or use sff_loss"
        )
    return samples


def _require_own(loss: Tensor, scores: Tensor) -> None:
    """Raise an InputError if a loss hands gradients to something else than a block's scores.

    A block-local step would drop these gradients: those of a parameter of `loss_fn`, or of y.
    """
    foreign = list(_leaves_between(loss, scores))
    if not foreign:
        return
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in foreign[:3])
    raise InputError(
        f"loss_fn or y hands gradients to {len(foreign)} tensors besides a block's scores, of "
        f"shapes {shapes}, and a block-local step would drop them. "
        "Hint: use sffx.sff_loss(net(x), y, loss_fn), or detach them"
    )


def _leaves_between(loss: Tensor, scores: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a loss's autograd graph that it reaches without passing the scores."""
    to_visit = [loss.grad_fn]
    # The scores count as seen, so the search does not go on into the stage behind them.
    seen = {scores.grad_fn}
    while to_visit:
        function = to_visit.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        # Only AccumulateGrad, the function of a leaf, has a variable: the leaf itself.
        if hasattr(function, "variable"):
            yield function.variable
        for following, _ in function.next_functions:
            to_visit.append(following)


def _nothing_learned(stage: Stage, count: int) -> InputError:
    return InputError(
        f"{stage.name} has a gradient, but none for its {count} trainable parameters. "
        "Hint: a wrapper, such as FSDP with flat parameters, trains others in their place; "
        "use sffx.sff_loss(net(x), y)"
    )
