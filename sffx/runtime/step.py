"""The block-local step: all gradients, with the activations of one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from sffx.blocks import BlockPlan
from sffx.errors import InputError
from sffx.inputs import batch_size, bind
from sffx.learning.losses import LossFunction, block_loss, check_targets, total
from sffx.net import plan_of
from sffx.runtime.gradients import Gradients, hooks_held_back, mark_gradients
from sffx.runtime.residencies import residency_of
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, stages_of
from sffx.runtime.walk import walk


def local_loss(
    net: fx.GraphModule, x: Any, y: Tensor, loss_fn: LossFunction | None = None
) -> Tensor:
    """Return the loss of all blocks; each block's gradient is computed as soon as it can be.

    The value equals `sff_loss(net(x), y)`. After `.backward()` the gradients are equal as well. But
    the activations of a block are freed before the next block runs. The result is an ordinary
    scalar: scale it, add to it, accumulate it over several calls.

    The blocks are called one by one. So hooks on `net` itself are not called, but hooks inside it
    are. A block with hooks inside saves less memory.

    Args:
        net: what `transform` returned, in train mode.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the
            model has several.
        y: class indices, (B,); or class probabilities, (B, J); or what `loss_fn` takes.
        loss_fn: a block's loss from its goodness and y, as `sff_loss` takes it; cross-entropy if
            None.

    Raises:
        InputError: `net` is no cut model, is in eval mode or is offloaded; x, y or a parameter of
            `loss_fn` requires gradient; x does not fit the model; or the labels do not fit.
    """
    losses: list[Tensor] = []
    parameters: list[nn.Parameter] = []
    gradients: list[Tensor] = []
    residency = residency_of(net)
    residency.prepare()
    for learned in _learn(net, x, y, loss_fn, residency, hooks_wait=True):
        losses.append(learned.loss)
        parameters += learned.gradients
        gradients += learned.gradients.values()
        residency.release(learned.stage, changed=False)
    value = total(losses)
    if not parameters or not torch.is_grad_enabled():
        return value
    return _Deposit.apply(value, gradients, *parameters)


def local_step(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    optimizer: Optimizer,
    loss_fn: LossFunction | None = None,
) -> Tensor:
    """Train one step: compute, use and free the gradients of each block before the next block runs.

    The parameters end up as after `local_loss(net, x, y).backward(); optimizer.step()`. But only
    one block's gradients are held at a time. Gradients from before the step are discarded, and none
    are left after it. Parameters that do not belong to `net` are left alone. The blocks of an
    offloaded model (`offload`) come to the device one after the other.

    Args:
        net: what `transform` returned, in train mode.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the
            model has several.
        y: class indices, (B,); or class probabilities, (B, J); or what `loss_fn` takes.
        optimizer: over the parameters of `net`; for an offloaded model, the one that it was
            offloaded with. With the groups of `parameter_groups`, each call of its `step` looks at
            one block only. An optimizer that looks at all gradients at once (LAMB, at their norm)
            sees one block's.
        loss_fn: a block's loss from its goodness and y, as `sff_loss` takes it; cross-entropy if
            None.

    Returns:
        The loss of all blocks before the step, a scalar without gradient.

    Raises:
        InputError: `net` is no cut model, is in eval mode, is frozen, or is offloaded with another
            optimizer; gradients are switched off; the optimizer holds none of its parameters or is
            LBFGS; `loss_fn` or y requires gradients; or the labels do not fit.

    Warns:
        UserWarning: several processes train. Their gradients are not averaged.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS computes the loss several times a step. Hint: sffx.local_loss in its closure"
        )
    residency = residency_of(net)
    residency.prepare()
    _require_learning(net)
    losses: list[Tensor] = []
    with residency.training_step(optimizer):
        net.zero_grad(set_to_none=True)
        for learned in _learn(net, x, y, loss_fn, residency, hooks_wait=False):
            losses.append(learned.loss)
            changed = bool(learned.gradients)
            if changed:
                _apply(optimizer, learned.gradients)
            residency.release(learned.stage, changed=changed)
            learned.gradients.clear()
    return total(losses)


class LocalLoss(nn.Module):
    """`local_loss` as a module, for wrappers such as `DistributedDataParallel(LocalLoss(net))`.

    Attributes:
        net: the cut model.
        loss_fn: a block's loss, as `sff_loss` takes it; cross-entropy if None.
    """

    def __init__(self, net: fx.GraphModule, loss_fn: LossFunction | None = None) -> None:
        super().__init__()
        self.net = net
        self.loss_fn = loss_fn

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Return the loss of all blocks, a scalar; see `local_loss`."""
        return local_loss(self.net, x, y, self.loss_fn)


@dataclass(frozen=True)
class _Learned:
    """One stage's loss, a detached scalar, and the gradients of its parameters."""

    stage: Stage
    loss: Tensor
    gradients: Gradients


def _learn(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    loss_fn: LossFunction | None,
    residency: Residency,
    *,
    hooks_wait: bool,
) -> Iterator[_Learned]:
    """Yield each stage's loss and gradients when its activations are freed, before the next runs.

    Args:
        net: as for `local_loss`, and so are the next three.
        x: the input.
        y: the targets.
        loss_fn: a block's loss.
        residency: of the net.
        hooks_wait: whether hooks of parameters wait until the gradients are handed over.
    """
    plan = plan_of(net)
    if not net.training:
        raise InputError(
            "the model is in eval mode, where it returns scores. "
            "Hint: call net.train() before a training step"
        )
    check_targets(y, _samples(plan, x), plan.num_classes, loss_fn)
    # Before any stage runs: sharding puts gathered parameters in the place of the model's own.
    trainable = [stage.trainable for stage in stages_of(net)]
    for stage, scores in walk(net, x):
        loss = block_loss(scores, y, loss_fn)
        learns = scores.requires_grad
        if loss_fn is not None or y.requires_grad:
            _require_own(loss, scores)
        # Nothing but the loss may hold the activations, or they outlive the backward pass.
        del scores
        parameters = trainable[stage.index]
        gradients: Gradients = {}
        if learns:
            hooks = (p._backward_hooks for p in parameters)
            with hooks_held_back(hooks) if hooks_wait else nullcontext():
                gradients = residency.gradients(loss, parameters)
            mark_gradients(gradients.values())
            if not gradients:
                raise _nothing_learned(stage, len(parameters))
        yield _Learned(stage, loss.detach(), gradients)


def _samples(plan: BlockPlan, x: Any) -> int:
    """Return the batch size of an input that a block-local step can take."""
    values = bind(plan, x)
    samples = batch_size(values)
    wants_gradient = any(isinstance(v, Tensor) and v.requires_grad for v in values.values())
    if wants_gradient and torch.is_grad_enabled():
        raise InputError(
            "x requires gradient, but a block-local step hands none on to its input. "
            "Hint: pass x.detach(), or use sff_loss"
        )
    return samples


def _require_learning(net: fx.GraphModule) -> None:
    """Raise an InputError if a step would train nothing."""
    if not torch.is_grad_enabled():
        raise InputError(
            "local_step was called without gradients, so it would train nothing. "
            "Hint: leave torch.no_grad() or torch.inference_mode(); "
            "sffx.local_loss returns the loss there"
        )
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise InputError(
            "no parameter of net requires a gradient, so local_step would train nothing. "
            "Hint: net.requires_grad_(True), or freeze some blocks only"
        )


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
    """Yield the leaves of a loss's autograd graph that lie on this side of some scores."""
    ahead = [loss.grad_fn]
    seen = {scores.grad_fn}
    while ahead:
        step = ahead.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if hasattr(step, "variable"):
            yield step.variable
        ahead += [following for following, _ in step.next_functions]


def _nothing_learned(stage: Stage, count: int) -> InputError:
    return InputError(
        f"{stage.name} has a gradient, but none for its {count} trainable parameters. "
        "Hint: a wrapper, such as FSDP with flat parameters, trains others in their place; "
        "use sffx.sff_loss(net(x), y)"
    )


def _apply(optimizer: Optimizer, gradients: Gradients) -> None:
    """Let the optimizer step on these parameters only, and leave none of their gradients."""
    groups = optimizer.param_groups
    everything = [group["params"] for group in groups]
    # Restored twice, so that one interrupt, even in the first restoring, cannot leave the optimizer
    # with the parameters of one block.
    try:
        try:
            _step_on(optimizer, gradients)
        finally:
            _restore(optimizer, groups, everything, gradients)
    finally:
        _restore(optimizer, groups, everything, gradients)


def _step_on(optimizer: Optimizer, gradients: Gradients) -> None:
    """Step, with all other parameters hidden from the optimizer."""
    groups = optimizer.param_groups
    for group in groups:
        group["params"] = [p for p in group["params"] if p in gradients]
    optimizer.param_groups = [group for group in groups if group["params"]]
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
    optimizer.step()


def _restore(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    everything: list[list[nn.Parameter]],
    gradients: Gradients,
) -> None:
    """Show the optimizer all its parameters again, and drop the gradients of those it stepped on."""
    optimizer.param_groups = groups
    for group, parameters in zip(groups, everything, strict=True):
        group["params"] = parameters
    for parameter in gradients:
        parameter.grad = None
    # Autocast caches casts of the parameters as they were before the step.
    torch.clear_autocast_cache()


class _Deposit(Function):
    """Hands precomputed gradients to the parameters, scaled by the gradient of the loss itself."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice on one local_loss, whose gradients were handed over the "
                "first time. Hint: call local_loss again"
            )
        # The context lets go of the gradients, so each becomes its parameter's .grad, not a copy.
        gradients = ctx.gradients
        ctx.gradients = None
        handed_over = list(gradients)
        if not _is_one(scale):
            handed_over = [_scaled(gradient, scale) for gradient in gradients]
        gradients.clear()
        return (None, None, *handed_over)


def _is_one(scale: Tensor) -> bool:
    """Return whether a scale is one, as far as that can be seen without waiting for a device."""
    return type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """Return a gradient times a scale, in the gradient's own memory where its dtype allows it."""
    if gradient.dtype.itemsize >= scale.dtype.itemsize:
        return gradient.mul_(scale.to(gradient.dtype))
    # A loss scale of 65,536, the first of torch's GradScaler, is infinite in float16.
    return (gradient.to(scale.dtype) * scale).to(gradient.dtype)
