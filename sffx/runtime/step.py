"""The block-local step: the value and gradients of `sff_loss(net(x), y)`, with the activations of one block at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from sffx.blocks import BlockPlan
from sffx.compiler.trace import storage
from sffx.errors import InputError
from sffx.inputs import batch_size, bind, explaining_input_errors
from sffx.kernels.activation import private_gradients
from sffx.kernels.recompute import is_plain
from sffx.learning.goodness import full_precision
from sffx.learning.losses import LossFunction, block_loss, check_targets, total
from sffx.memory.count import mark_gradients
from sffx.net import plan_of
from sffx.runtime.hooks import kept_back
from sffx.runtime.offload import Parking, parking_of
from sffx.runtime.optimizers import require_optimizer_of
from sffx.runtime.shard import ready, reshard, sharded_gradients


def local_loss(
    net: fx.GraphModule, x: Any, y: Tensor, loss_fn: LossFunction | None = None
) -> Tensor:
    """Return the loss of all blocks, computing each block's gradient as soon as its goodness is there.

    Equal to `sff_loss(net(x), y)`, in value and, after `.backward()`, in gradients, but the activations of a block are freed before the
    next block runs. The result is an ordinary scalar: scale it, add to it, accumulate over several calls. Hooks on `net` itself are not
    called, since its blocks are called one by one; those in it are, and where a block has some, less of its memory is saved.

    Args:
        net: what `transform` returned, in train mode.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the model has several.
        y: class indices, (B,), or probabilities of the classes, (B, J), or what `loss_fn` takes.
        loss_fn: a block's loss from its goodness and y, as `sff_loss` takes it; cross-entropy if None.

    Raises:
        InputError: `net` is no cut model or is in eval mode, x requires gradient or is not what the model can run on, or the labels do not
            fit.
    """
    losses: list[Tensor] = []
    parameters: list[nn.Parameter] = []
    gradients: list[Tensor] = []
    for loss, found in _block_steps(net, x, y, loss_fn, sharded=ready(net), keep_hooks_back=True):
        losses.append(loss)
        parameters += found
        gradients += found.values()
    value = total(losses)
    return (
        _Deposit.apply(value, gradients, *parameters)
        if parameters and torch.is_grad_enabled()
        else value
    )


def local_step(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    optimizer: Optimizer,
    loss_fn: LossFunction | None = None,
) -> Tensor:
    """Train one step, each block by itself: its gradients are computed, used and freed before the next block runs.

    The parameters end up as after `local_loss(net, x, y).backward(); optimizer.step()`, but the gradients of one block at a time are held.
    Gradients from before the step are discarded, and none are left after it; parameters that are not of `net` are left alone. Of a model
    that is parked (`park`), the blocks come to the device one after the other.

    Args:
        net: what `transform` returned, in train mode.
        x: the input, (B, ...); a tuple of positional or a mapping of keyword arguments where the model has several.
        y: class indices, (B,), or probabilities of the classes, (B, J), or what `loss_fn` takes.
        optimizer: over the parameters of `net`. With the groups of `parameter_groups`, each call of its `step` looks at one block only.
            Of a parked model, the one that it was parked with. One that looks at all gradients at once, as LAMB does at their norm, sees
            one block's.
        loss_fn: a block's loss from its goodness and y, as `sff_loss` takes it; cross-entropy if None.

    Returns:
        The loss of all blocks before the step, a scalar without gradient.

    Raises:
        InputError: `net` is no cut model or is in eval mode, or is parked with another optimizer, the optimizer holds none of its
            parameters or is LBFGS, or the labels do not fit.

    Warns:
        UserWarning: several processes train; their gradients are not averaged.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "LBFGS computes the loss several times a step. Hint: sffx.local_loss in its closure"
        )
    sharded = ready(net)
    distributed = (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
    if distributed and not sharded:
        warnings.warn(
            "local_step does not average gradients over processes. Hint: DistributedDataParallel(sffx.LocalLoss(net))",
            stacklevel=2,
        )
    parking = _parking(net, optimizer)
    if parking is None:  # else it was required when the model was parked
        require_optimizer_of(net, optimizer)
    net.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    with parking.step() if parking is not None else nullcontext():
        for loss, found in _block_steps(net, x, y, loss_fn, sharded=sharded, keep_hooks_back=False):
            losses.append(loss)
            if found:
                _apply(optimizer, found)
            if parking is not None:
                parking.leave(changed=bool(found))
            found.clear()
    return total(losses)


def _parking(net: fx.GraphModule, optimizer: Optimizer) -> Parking | None:
    """Return how the model is parked, if it is.

    Raises:
        InputError: it is, with another optimizer.
    """
    parking = parking_of(net)
    if parking is not None and parking.optimizer is not optimizer:
        raise InputError(
            "net is parked with another optimizer, whose state moves with it. Hint: pass that one, or unpark and park anew"
        )
    return parking


def _block_steps(
    net: fx.GraphModule,
    x: Any,
    y: Tensor,
    loss_fn: LossFunction | None,
    *,
    sharded: bool,
    keep_hooks_back: bool,
) -> Iterator[tuple[Tensor, dict[nn.Parameter, Tensor]]]:
    """Yield each block's loss and gradients, when its activations are freed and before the next block runs."""
    walk = BlockWalk(net)
    check_targets(y, _batch_size(walk.plan, x), walk.plan.num_classes, loss_fn)
    for part, scores in walk.run(x):
        loss, learns = block_loss(scores, y, loss_fn), scores.requires_grad
        del scores
        with (
            kept_back(p._backward_hooks for p in walk.trainable[part])
            if keep_hooks_back
            else nullcontext()
        ):
            found = _gradients(loss, walk.trainable[part], sharded) if learns else {}
        if learns and not found:
            raise InputError(
                f"{walk.parts[part][0]} has a gradient, but none for its {len(walk.trainable[part])} trainable parameters. "
                "Hint: a wrapper, such as FSDP with flat parameters, trains others in their place; use sffx.sff_loss(net(x), y)"
            )
        if sharded:  # what is frozen, or runs without gradients, has no backward pass that would let go of it
            for target in walk.parts[part]:
                reshard(net.get_submodule(target))
        yield loss.detach(), found


def _apply(optimizer: Optimizer, gradients: dict[nn.Parameter, Tensor]) -> None:
    """Let the optimizer step on these parameters only; all others are kept out of its sight."""
    groups = optimizer.param_groups
    held = [group["params"] for group in groups]
    try:
        for p, gradient in gradients.items():
            p.grad = gradient
            for hook in (p._post_accumulate_grad_hooks or {}).values():
                hook(p)
        for group in groups:
            group["params"] = [p for p in group["params"] if p in gradients]
        optimizer.param_groups = [group for group in groups if group["params"]]
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        for group, parameters in zip(groups, held, strict=True):
            group["params"] = parameters
        for p in gradients:
            p.grad = None
        torch.clear_autocast_cache()  # which holds what it has cast of the parameters as they were


class LocalLoss(nn.Module):
    """`local_loss` as a module, for what wraps modules, such as `DistributedDataParallel(LocalLoss(net))`.

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


class BlockWalk:
    """Runs the outer graph of a cut model and stops at each goodness.

    Attributes:
        plan: of the model.
        trainable: the trainable parameters of each block with its head, by the index of the block; the classifier's come last.
        private: the modules in which nobody sees the gradients of values, since there are no hooks.
    """

    def __init__(self, net: fx.GraphModule) -> None:
        self.plan = plan_of(net)
        if not net.training:
            raise InputError(
                "the model is in eval mode, where it returns scores. Hint: call net.train() before a training step"
            )
        self.net = net
        self.parts = self.plan.parts
        self.trainable = [
            [
                p
                for target in part
                for p in net.get_submodule(target).parameters()
                if p.requires_grad
            ]
            for part in self.parts
        ]
        self.private = {
            target
            for part in self.parts
            if not any(_has_hooks(net.get_submodule(target)) for target in part)
            for target in part
        }

    def run(self, x: Any) -> Iterator[tuple[int, Tensor]]:
        """Yield each block's index and its goodness, (B, J), with the block's graph attached; the classifier's logits come last.

        A block's graph hangs on what was yielded only, so it is freed when the caller lets go of it.
        """
        ends = {part[-1]: i for i, part in enumerate(self.parts)}
        bound = bind(self.plan, x)
        values: dict[fx.Node, Any] = {
            node: bound[str(node.target)]
            for node in self.net.graph.nodes
            if node.op == "placeholder"
        }
        last_readers = _last_readers(self.net.graph)
        for node in self.net.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.target == "readout":
                return
            with (
                private_gradients(node.target in self.private),
                explaining_input_errors(self.net, bound),
            ):
                values[node] = self._value(node, values)
            if node.target in ends:
                # The block's value goes on without its graph, and nothing here keeps the goodness.
                for name in values:
                    if name is not node:
                        values[name] = tree_map_only(Tensor, Tensor.detach, values[name])
                yield ends[node.target], values.pop(node)
            for spent in last_readers.get(node, ()):
                values.pop(spent, None)

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        target: Any = node.target
        if node.op == "call_module":
            return self.net.get_submodule(target)(*args)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:])
        return target(*args)


class _Deposit(Function):
    """Hands gradients that were computed before to the parameters, scaled by the gradient of the loss itself."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice on one local_loss, whose gradients were handed over the first time. Hint: call local_loss again"
            )
        # Scaled in place and let go of, so that each becomes its parameter's .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        is_one = (
            type(scale) is Tensor and scale.device.type == "cpu" and scale.item() == 1
        )  # on a GPU, asking would wait for it
        scaled = (
            gradients.copy()
            if is_one
            else [gradient.mul_(scale.to(gradient.dtype)) for gradient in gradients]
        )
        gradients.clear()
        return (None, None, *scaled)


def _gradients(
    loss: Tensor, parameters: list[nn.Parameter], sharded: bool
) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of those parameters that the loss depends on, each its own tensor; the graph of the loss is freed."""
    # Autocast is for forward passes; `.backward()` runs outside of it, and so must this.
    with full_precision(loss):
        if sharded:
            found = sharded_gradients(loss, parameters)
        else:
            found = _own(
                parameters,
                torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else (),
            )
    mark_gradients(found.values())
    return found


def _own(
    parameters: list[nn.Parameter], gradients: Iterable[Tensor | None]
) -> dict[nn.Parameter, Tensor]:
    """Return gradients by parameter, each its own tensor."""
    found: dict[nn.Parameter, Tensor] = {}
    seen: set[int] = set()
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        # Of a sum of two parameters, autograd gives both the same tensor, and of a broadcast one a view whose elements share memory.
        key = storage(gradient)
        found[p] = (
            gradient.clone(memory_format=torch.contiguous_format)
            if key in seen or 0 in gradient.stride()
            else gradient
        )
        seen.add(key)
    return found


def _batch_size(plan: BlockPlan, x: Any) -> int:
    values = bind(plan, x)
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise InputError(
            "x requires gradient, but a block-local step hands none on to its input. Hint: pass x.detach(), or use sff_loss"
        )
    return batch_size(values)


def _has_hooks(part: nn.Module) -> bool:
    """Whether hooks on a block or a head, or in it, may see gradients; forward hooks on the whole (`park` has some) see none."""
    inner = (module for module in part.modules() if module is not part)
    return bool(part._backward_hooks or part._backward_pre_hooks) or not all(map(is_plain, inner))


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the nodes whose values nobody reads after it."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.users:
            readers.setdefault(max(node.users, key=order.__getitem__), []).append(node)
    return readers
