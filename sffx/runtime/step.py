"""The block-local step: compute all gradients, and hold the activations of one block only.

`local_step` runs through these functions, once for each stage:

    walk -> Stage.score        run the block and its head           walk.py, stage.py
    learn -> block_loss        the loss of this stage               learn.py
    residency.gradients        the gradients of this stage          residency.py, gradients.py
    residency.update           the optimizer steps on this stage    residency.py, update.py
    residency.release          the stage may leave the device       residency.py
    walk -> Stage.hand_on      detach and norm, for the next one    walk.py, stage.py

`local_loss` keeps the gradients instead. Its backward pass hands them to the parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sffx.errors import InputError, in_brief
from sffx.kernels.batch_counts import counts_added_at_end
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.learning.losses import LossFunctions, loss_functions, total
from sffx.net import plan_of, require_uncompiled
from sffx.runtime.find_residency import residency_of
from sffx.runtime.gradients import Gradients
from sffx.runtime.learn import Learned, OnBlock, blocks_to_learn, learn, learning_stages
from sffx.runtime.optimizers import require_optimizer
from sffx.runtime.residency import Collected, Residency
from sffx.runtime.stage import Stage
from sffx.runtime.update import Updates

# One optimizer, or one for each block by the block's name.
Optimizers: TypeAlias = Optimizer | Mapping[str, Optimizer]


def local_loss(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    loss_fn: LossFunctions | None = None,
    *,
    blocks: Collection[str] | None = None,
    on_block: OnBlock | None = None,
) -> Tensor:
    """Return the loss of all blocks, and compute each block's gradients as soon as it has run.

    The value equals `sff_loss(net(x), y)`. After `.backward()` the gradients are equal as well. But
    the activations of a block are freed before the next block runs. The result is an ordinary
    scalar: scale it, add to it, accumulate it over several calls.

    The blocks are called one by one. So hooks on `net` itself are not called, but hooks inside it
    are. A block with hooks inside saves less memory.

    Args:
        net: what `transform` returned, in train mode.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the
            model has several; or values that `cache_outputs` made, from which later blocks learn.
        y: class indices, (B,); or class probabilities, (B, J); or targets of another task
            (`sffx.tasks`); or what `loss_fn` takes.
        loss_fn: a block's loss from its goodness and y, or one for each block by name or in order,
            as `sff_loss` takes it; cross-entropy if None.
        blocks: names of the blocks that learn ("block_0", ..., "classifier"), all if None. The
            loss is the sum of their losses only. Blocks before them run in eval mode without
            gradients, so their running statistics stay. Blocks behind the last of them do not run.
        on_block: called with the name of each block that learns, its scores, (B, J), and its loss,
            both detached. With an objective of several views the scores are what the head gives in
            train mode, (views * B, ...).

    Raises:
        InputError: `net` is no cut model, is in eval mode or is offloaded; x, y or a parameter of
            `loss_fn` requires gradient; x does not fit the model or has no samples; the labels do
            not fit; or a name is not that of a block.
        ProcessError: as for `local_step`.
    """
    losses: list[Tensor] = []
    parameters: list[nn.Parameter] = []
    gradients: list[Tensor] = []
    for learned, collected in _collect(net, x, y, loss_fn, blocks, on_block):
        losses.append(learned.loss)
        parameters += collected
        gradients += collected.values()
    return _with_gradients(total(losses), parameters, gradients)


def block_losses(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    loss_fn: LossFunctions | None = None,
    *,
    blocks: Collection[str] | None = None,
    on_block: OnBlock | None = None,
) -> dict[str, Tensor]:
    """Return the loss of each block by the block's name, scalars whose sum is `local_loss`.

    Each loss hands its own block its gradients, by a `.backward()` of its own or of any sum. So a
    loss can be weighted, logged or left out. As with `local_loss`, the activations of a block are
    freed before the next block runs, and the gradients are held until they are handed over.

    The arguments and errors are those of `local_loss`.
    """
    losses: dict[str, Tensor] = {}
    for learned, collected in _collect(net, x, y, loss_fn, blocks, on_block):
        parameters = list(collected)
        gradients = list(collected.values())
        # The caller of `on_block` holds the loss itself.
        losses[learned.stage.name] = _with_gradients(learned.loss.clone(), parameters, gradients)
    return losses


def local_step(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    optimizer: Optimizers,
    loss_fn: LossFunctions | None = None,
    *,
    blocks: Collection[str] | None = None,
    on_block: OnBlock | None = None,
) -> Tensor:
    """Train one step: compute, use and free the gradients of each block before the next block runs.

    The parameters end up as after `local_loss(net, x, y).backward(); optimizer.step()`. But only
    one block's gradients are held at a time. Gradients from before the step are discarded, and none
    are left after it. Parameters that do not belong to `net` are left alone. The blocks of an
    offloaded model (`offload`) come to the device one after the other. The gradients of a
    replicated one (`replicate`) are averaged over the processes, and each block is updated just
    before it is next read.

    Args:
        net: what `transform` returned, in train mode.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the
            model has several; or values that `cache_outputs` made, from which later blocks learn.
        y: class indices, (B,); or class probabilities, (B, J); or targets of another task
            (`sffx.tasks`); or what `loss_fn` takes.
        optimizer: over the parameters of `net`, or a mapping with an optimizer for each block that
            learns, by the block's name. For an offloaded model, it is the one that the model was
            offloaded with. With the groups of `parameter_groups`, each call of its `step` looks at
            one block only. So an optimizer that uses all gradients at once, as LAMB uses their
            norm, sees only those of one block.
        loss_fn: a block's loss from its goodness and y, or one for each block by name or in order,
            as `sff_loss` takes it; cross-entropy if None.
        blocks: names of the blocks that learn, as for `local_loss`; all if None.
        on_block: called with the name of each block that learns, its scores and its loss, as for
            `local_loss`, before the block's parameters change.

    Returns:
        The loss of the blocks that learn before the step, a scalar without gradient.

    Raises:
        InputError: `net` is no cut model, is in eval mode, is frozen, or is offloaded with another
            optimizer; gradients are switched off; the optimizer holds no parameter of a block that
            learns or is LBFGS; a block has no optimizer; `loss_fn` or y requires gradients; the
            labels do not fit; x has no samples; or a name is not that of a block.
        ProcessError: the net is replicated or sharded, and another process failed or does something
            else.

    Warns:
        UserWarning: several processes train. Their gradients are not averaged.
    """
    residency = residency_of(net)
    residency.prepare()
    blocks = blocks_to_learn(net, x, blocks)
    stages = learning_stages(net, blocks)
    _require_learning(stages)
    optimizers = optimizers_of_stages(stages, optimizer)
    losses: list[Tensor] = []
    # Several stages may have the same optimizer.
    distinct = list(dict.fromkeys(optimizers.values()))
    with (
        residency.learning(stages, "step"),
        residency.training_step(distinct),
        counts_added_at_end(_counts_wait(residency, on_block)),
    ):
        require_all_learn(stages, optimizers)
        updates = {each: Updates(each) for each in distinct}
        net.zero_grad(set_to_none=True)
        for learned in learn(
            net, x, y, loss_fn, residency, only=blocks, on_block=on_block, hooks_wait=False
        ):
            losses.append(learned.loss)
            # Asked before the update, which takes the gradients out.
            changed = bool(learned.gradients)
            own = optimizers.get(learned.stage.name)
            # `learned` lives on while the next stage runs, but its gradients must not.
            residency.update(learned.stage, learned.gradients, updates[own] if own else None)
            residency.release(learned.stage, changed=changed)
    return total(losses)


class LocalLoss(nn.Module):
    """`local_loss` as a module, for wrappers such as `DistributedDataParallel(LocalLoss(net))`.

    Attributes:
        net: the cut model.
        loss_fn: the blocks' losses, as `sff_loss` takes them; cross-entropy if None.
        blocks: names of the blocks that learn, all if None.

    Raises:
        InputError: `net` is no cut model or was compiled as a whole, or `loss_fn` or `blocks` name
            other blocks.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        loss_fn: LossFunctions | None = None,
        *,
        blocks: Collection[str] | None = None,
    ) -> None:
        plan = plan_of(net)
        require_uncompiled(net)
        loss_functions(loss_fn, len(plan.all_blocks))
        learning_stages(net, blocks)
        super().__init__()
        self.net = net
        self.loss_fn = loss_fn
        self.blocks = blocks

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Return the loss of the blocks, a scalar; see `local_loss`."""
        return local_loss(self.net, x, y, self.loss_fn, blocks=self.blocks)


def _collect(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    loss_fn: LossFunctions | None,
    blocks: Collection[str] | None,
    on_block: OnBlock | None,
) -> list[tuple[Learned, Gradients]]:
    """Return what each stage has learnt, and its gradients as `backward` hands them over.

    The arguments are those of `local_loss`.
    """
    residency = residency_of(net)
    residency.prepare()
    blocks = blocks_to_learn(net, x, blocks)
    on_their_way: list[tuple[Learned, Collected]] = []
    with (
        residency.learning(learning_stages(net, blocks), "loss"),
        counts_added_at_end(_counts_wait(residency, on_block)),
    ):
        for learned in learn(
            net, x, y, loss_fn, residency, only=blocks, on_block=on_block, hooks_wait=True
        ):
            on_their_way.append((learned, residency.collect(learned.stage, learned.gradients)))
            residency.release(learned.stage, changed=False)
    return [(learned, collected.wait()) for learned, collected in on_their_way]


def _counts_wait(residency: Residency, on_block: OnBlock | None) -> bool:
    """Return whether batch norms may count the batch at the end of the step."""
    # A block that leaves the device takes its numbers along, and `on_block` may read them.
    return on_block is None and type(residency) is Residency


def optimizers_of_stages(stages: list[Stage], optimizer: Optimizers) -> dict[str, Optimizer]:
    """Return the optimizer of each stage that learns, by the stage's name.

    Raises:
        InputError: a stage has none, or one that lacks some of its parameters or is LBFGS.
    """
    if not isinstance(optimizer, Mapping):
        _require_single_loss(optimizer)
        return {stage.name: optimizer for stage in stages}
    by_name: dict[str, Optimizer] = {}
    for stage in stages:
        if not stage.trainable:
            continue
        if stage.name not in optimizer:
            raise InputError(
                f"{stage.name} has no optimizer, only {', '.join(optimizer) or 'nothing'} has one. "
                "Hint: blocks=[...] trains some blocks only"
            )
        own = optimizer[stage.name]
        _require_single_loss(own)
        _require_whole(stage, own)
        by_name[stage.name] = own
    return by_name


def _require_whole(stage: Stage, optimizer: Optimizer) -> None:
    """Raise an InputError if an optimizer of one stage lacks some of its trainable parameters."""
    held = _held(optimizer)
    trainable = stage.trainable
    lacking = [p for p in trainable if p not in held]
    if lacking:
        raise InputError(
            f"the optimizer of {stage.name} lacks {len(lacking)} of its {len(trainable)} trainable "
            "parameters. Hint: a group of sffx.parameter_groups(net, lr) has those of the block "
            "and of its head"
        )


def require_all_learn(stages: list[Stage], optimizers: Mapping[str, Optimizer]) -> None:
    """Raise an InputError if a stage would learn nothing, since its optimizer does not hold it.

    One optimizer for all stages may lack some parameters of a stage, as of a layer that shall not
    change.

    Args:
        stages: that learn.
        optimizers: by the name of the stage. They hold parameters of the net.
    """
    held = {each: _held(each) for each in optimizers.values()}
    apart = []
    for stage in stages:
        trainable = stage.trainable
        if trainable and held[optimizers[stage.name]].isdisjoint(trainable):
            apart.append(stage.name)
    if apart:
        raise InputError(
            f"the optimizer holds no parameter of {in_brief(apart, 3)}, which would learn nothing. "
            "Hint: sffx.parameter_groups(net, lr) holds those of all blocks; blocks=[...] trains "
            "some blocks only"
        )


def _held(optimizer: Optimizer) -> set[Tensor]:
    """Return the parameters of an optimizer."""
    held: set[Tensor] = set()
    for group in optimizer.param_groups:
        held.update(group["params"])
    return held


def _require_single_loss(optimizer: Optimizer) -> None:
    """Raise an InputError for what is no optimizer, and for one that computes the loss itself."""
    require_optimizer(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS computes the loss several times a step. Hint: sffx.local_loss in its closure"
        )


def _require_learning(stages: list[Stage]) -> None:
    """Raise an InputError if a step would train nothing."""
    if not torch.is_grad_enabled():
        raise InputError(
            "local_step was called without gradients, so it would train nothing. "
            "Hint: leave torch.no_grad() or torch.inference_mode(); "
            "sffx.local_loss returns the loss there"
        )
    if not any(stage.trainable for stage in stages):
        raise InputError(
            "no parameter of the blocks to train requires a gradient, so local_step would train "
            "nothing. Hint: net.requires_grad_(True), or freeze some blocks only"
        )


def _with_gradients(
    value: Tensor, parameters: list[nn.Parameter], gradients: list[Tensor]
) -> Tensor:
    """Return a loss whose backward pass hands these gradients to the parameters.

    Args:
        value: of the loss, a tensor that nobody else holds.
        parameters: that the gradients belong to.
        gradients: one for each parameter. The list is emptied when they are handed over.
    """
    if not parameters or not torch.is_grad_enabled():
        return value
    return _Deposit.apply(value, gradients, *parameters)


class _Deposit(HandWritten):
    """Hands precomputed gradients to the parameters, in the backward pass of the loss.

    They are scaled by the gradient of the loss itself, which is 1 for a plain `loss.backward()`.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        # The value itself becomes the loss. A copy would be one more operation.
        ctx.mark_dirty(value)
        return value

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice on one local_loss, whose gradients were handed over the "
                "first time. Hint: call local_loss again"
            )
        # Torch makes a gradient that nobody else holds the parameter's .grad, and copies any other.
        # So the context lets go of the gradients.
        gradients = ctx.gradients
        ctx.gradients = None
        handed_over = list(gradients) if _is_one(scale) else scaled(gradients, scale)
        gradients.clear()
        return (None, None, *handed_over)


def _is_one(scale: Tensor) -> bool:
    """Return whether a scale is one. On a GPU the answer is False, to not wait for the device."""
    return type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1


def scaled(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Return gradients times a scale, in their own memory where their dtype allows it.

    It takes one operation for all gradients of one dtype on one device.
    """
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    results: list[Tensor] = []
    for gradient in gradients:
        if gradient.dtype.itemsize < scale.dtype.itemsize:
            # A loss scale of 65,536, the first of torch's GradScaler, is infinite in float16.
            gradient = (gradient.to(scale.dtype) * scale).to(gradient.dtype)
        else:
            by_kind[gradient.dtype, gradient.device].append(gradient)
        results.append(gradient)
    for (dtype, device), own in by_kind.items():
        torch._foreach_mul_(own, scale.to(device, dtype))
    return results
