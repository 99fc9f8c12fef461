"""Predict, on fake tensors and so without any memory of its own, what a block-local training step of a cut model holds at its peak.

The step is `local_loss(net, x, y).backward(); optimizer.step()` in the steady state of AdamW, which keeps two values for each trainable
parameter; `local_step` holds no more. Each block is run by itself, forward and backward with its head, and its bytes are counted; what is
held beside a block while it runs is added: parameters, optimizer state, the gradients of the blocks before, the input batch. Of a parked
model, these are the parameters and the optimizer state of the block and of the one that comes next, and no gradients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sffx.blocks import Block, BlockPlan
from sffx.compiler.examples import DATA_DEPENDENT
from sffx.compiler.fake import fake_copy
from sffx.errors import InputError
from sffx.learning.losses import block_loss
from sffx.memory.count import MIB, count_memory, mark_gradients
from sffx.net import plan_of
from sffx.runtime.shard import require_whole
from sffx.runtime.step import BlockWalk

# What AdamW keeps for a trainable parameter, in sizes of the parameter, and a step counter for each.
STATES = 2
COUNTER = 4
# What AdamW makes while it updates a parameter, in sizes of the parameter: the root of the second moment, and its quotient.
UPDATE = 2


@dataclass(frozen=True)
class Footprint:
    """The predicted peak of a block-local step with AdamW, in bytes. Frozen; prints as a table.

    Attributes:
        batch_size: that it was predicted for.
        blocks: names of the blocks, "block_0" to "classifier".
        parameters: parameters and buffers of the cut model, heads included.
        optimizer_state: of AdamW.
        inputs: the input batch and the labels.
        gradients: of each block with its head.
        running: for each block, the peak while it runs: activations, side values, its own gradients.
        updates: for each block, what the optimizer makes beside its state.
        passed: for each block, what it and those before it pass on, which is there while the optimizer updates the block by itself.
        resident: for each block of a parked model, its parameters, buffers and state with AdamW; empty where all are held all the time.
    """

    batch_size: int
    blocks: tuple[str, ...]
    parameters: int
    optimizer_state: int
    inputs: int
    gradients: tuple[int, ...]
    running: tuple[int, ...]
    updates: tuple[int, ...]
    passed: tuple[int, ...]
    resident: tuple[int, ...] = ()

    @property
    def update(self) -> int:
        """What the optimizer makes beside its state."""
        return max(self.updates)

    @property
    def held(self) -> int:
        """What is on the device all the time."""
        return (
            self.inputs if self.resident else self.parameters + self.optimizer_state + self.inputs
        )

    @property
    def peaks(self) -> tuple[int, ...]:
        """The peak of the step in each block, and last in the optimizer; of a parked model, in each block and its own update."""
        if self.resident:
            present = [sum(self.resident[i : i + 2]) for i in range(len(self.resident))]
            updates = map(sum, zip(self.gradients, self.updates, self.passed, strict=True))
            return tuple(
                self.held + there + max(both)
                for there, *both in zip(present, self.running, updates, strict=True)
            )
        before = [sum(self.gradients[:i]) for i in range(len(self.gradients) + 1)]
        own = [self.held + before[i] + running for i, running in enumerate(self.running)]
        return (*own, self.held + before[-1] + self.update)

    @property
    def peak(self) -> int:
        """The peak of the step."""
        return max(self.peaks)

    def __str__(self) -> str:
        lines = [
            f"{'MiB, batch ' + str(self.batch_size):<22}{'block alone':>14}{'peak of the step':>18}"
        ]
        rows = zip(
            (*self.blocks, "optimizer.step()"),
            (*self.running, self.update),
            self.peaks,
            strict=False,
        )
        lines += [
            f"{name:<22}{running / MIB:>14.2f}{peak / MIB:>18.2f}" for name, running, peak in rows
        ]
        lines.append(
            f"held all the time: {self.held / MIB:.2f} (parameters {0 if self.resident else self.parameters / MIB:.2f})"
        )
        if self.resident:
            lines.append(
                f"in host memory: {sum(self.resident) / MIB:.2f}, of which a block and the next are copied to the device"
            )
        return "\n".join(lines)


def footprint(net: fx.GraphModule, batch_size: int, *, parked: bool = False) -> Footprint:
    """Predict the peak memory of a training step of a cut model for a batch size.

    Args:
        net: what `transform` returned; it is not touched.
        batch_size: B.
        parked: predict what a `local_step` holds on the device once the model is parked (`park`).

    Raises:
        InputError: `net` is no cut model or is sharded, `batch_size` is no positive integer, or the shapes depend on data.
    """
    plan_of(net)
    require_whole(net)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}. Hint: pass a positive integer")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    probe = fake_copy(net, mode).train()
    with mode:
        found = fake_footprint(probe, batch_size)
    return replace(found, resident=_resident(net)) if parked else found


def fake_footprint(net: fx.GraphModule, batch_size: int, skip: Collection[int] = ()) -> Footprint:
    """Predict the peak of a cut model on fake parameters, inside their mode; blocks to skip are run but not counted.

    Raises:
        InputError: shapes depend on data.
    """
    plan, device = plan_of(net), next(net.parameters()).device
    x = tuple(
        torch.ones((batch_size, *i.shape), device=device).to(getattr(torch, i.dtype))
        for i in plan.inputs
    )
    y = torch.zeros(batch_size, dtype=torch.int64, device=device)
    walk = BlockWalk(net)
    try:
        running, passed = _running(walk, x, y, skip)
    except DATA_DEPENDENT as cause:
        raise InputError(
            f"the memory of {plan.model} cannot be predicted, since shapes in it depend on data. Hint: count a real step with "
            "sffx.memory.count.count_memory"
        ) from cause
    trainable = [p for part in walk.trainable for p in part]
    return Footprint(
        batch_size=batch_size,
        blocks=tuple(part[0] for part in walk.parts),
        parameters=_bytes([*net.parameters(), *net.buffers()]),
        optimizer_state=STATES * _bytes(trainable) + COUNTER * len(trainable),
        inputs=_bytes([*x, y]),
        gradients=tuple(_bytes(part) for part in walk.trainable),
        running=running,
        updates=tuple(UPDATE * max((p.nbytes for p in part), default=0) for part in walk.trainable),
        passed=passed,
    )


def _resident(net: fx.GraphModule) -> tuple[int, ...]:
    """Return the bytes of each block and of AdamW's state for it."""
    parts = [[net.get_submodule(target) for target in part] for part in plan_of(net).parts]
    tensors = [
        [t for module in modules for t in (*module.parameters(), *module.buffers())]
        for modules in parts
    ]
    return tuple(
        _bytes(part) + STATES * _bytes(p for p in part if p.requires_grad) for part in tensors
    )


def _running(
    walk: BlockWalk, x: tuple[Tensor, ...], y: Tensor, skip: Collection[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return, for each block, the peak while it runs, all bytes but those of parameters and of the input batch, and what is passed on then.

    The peak is 0 for blocks to skip.
    """
    sizes = _value_bytes(walk)
    scores = walk.run(x)
    running, passed = [], []
    for part, parameters in enumerate(walk.trainable):
        if part in skip:
            with torch.no_grad():
                next(scores)
            running.append(0)
            passed.append(0)
            continue
        count = count_memory(
            lambda parameters=parameters: _step(scores, x, y, parameters), model=walk.net
        )  # type: ignore[misc]
        passing = sum(sizes[name] for name in _passing(walk.plan, part))
        running.append(count.peak - count.parameters - _bytes([*x, y]) + passing)
        own = [(block.output, *block.sides) for block in walk.plan.blocks[part : part + 1]]
        passed.append(passing + sum(sizes[name] for names in own for name in names))
    return tuple(running), tuple(passed)


def _step(
    scores: Iterator[tuple[int, Tensor]],
    x: tuple[Tensor, ...],
    y: Tensor,
    parameters: list[nn.Parameter],
) -> None:
    """Run the next block forward and backward, as `local_loss` does."""
    for tensor in (*x, y):
        tensor.view_as(tensor)  # read, so that it is counted whether or not the block reads it
    loss = block_loss(next(scores)[1], y)
    if loss.requires_grad:
        mark_gradients(torch.autograd.grad(loss, parameters, allow_unused=True))


def _value_bytes(walk: BlockWalk) -> dict[str, int]:
    """Return a dict that fills with the bytes of each block's output and side values when the block has run."""
    found: dict[str, int] = {}
    for block in walk.plan:

        def note(_: nn.Module, args: object, returned: Any, block: Block = block) -> None:
            values = returned if block.sides else (returned,)
            found.update(
                {
                    name: _bytes(tree_leaves(value))
                    for name, value in zip((block.output, *block.sides), values, strict=True)
                }
            )

        walk.net.get_submodule(block.target).register_forward_hook(note)
    return found


def _passing(plan: BlockPlan, part: int) -> list[str]:
    """Return the side values of earlier blocks that a block does not read and a later one does."""
    blocks = plan.all_blocks
    later = {name for block in blocks[part + 1 :] for name in block.inputs}
    return [
        side
        for block in blocks[:part]
        for side in block.sides
        if side in later and side not in blocks[part].inputs
    ]


def _bytes(values: Iterable[object]) -> int:
    """Return the bytes of tensors, each storage once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in values
        if isinstance(t, Tensor)
    }
    return sum(storages.values())
