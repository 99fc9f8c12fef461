"""Predict the peak memory of a block-local training step, on fake tensors.

The step is `local_loss(net, x, y).backward(); optimizer.step()` with AdamW in its steady state, in
which it keeps two values for each trainable parameter. `local_step` holds no more.

Each stage runs forward and backward by itself, and its bytes are counted. Then the memory that is
held beside the stage is added: parameters, optimizer state, the gradients of earlier stages, the
input batch. With offloading less is held beside it: the input batch, and the parameters and the
optimizer state of two blocks, the one that runs and the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sffx.blocks import Block, BlockPlan
from sffx.checks import positive_integer, require_flag
from sffx.compiler.caches import caches_restored
from sffx.compiler.fake import failures_unlogged, fake_copy
from sffx.errors import InputError, SffxError, failure_in_words
from sffx.inputs import constant_batch
from sffx.kernels.batch_slices import counting
from sffx.learning.losses import shared_entropy
from sffx.memory.backpropagation import backpropagation_peak
from sffx.memory.count import count_memory
from sffx.memory.values import why_values_are_needed
from sffx.net import cut_model, plan_of
from sffx.progress import running
from sffx.runtime.find_residency import make_whole
from sffx.runtime.gate import KeepsNothing
from sffx.runtime.learn import Lesson, learn_stage
from sffx.runtime.offloadable import norm_tensors
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, Values, stages_of, stages_that_learn
from sffx.runtime.views import losses_of, training_input
from sffx.runtime.walk import walk
from sffx.tables import MIB, Column, text_table

# AdamW's state for a trainable parameter, in sizes of the parameter: the two moments.
STATES = 2
# Bytes of AdamW's step counter for a trainable parameter.
COUNTER = 4
# Temporaries of AdamW while it updates a parameter, in sizes of the parameter: the root of the
# second moment, and the quotient.
UPDATE = 2

# How torch's error begins where a norm gets a single value of a channel, which has no variance.
_SINGLE_VALUE = "Expected more than 1"


@dataclass(frozen=True)
class Footprint:
    """The predicted peak of a block-local step with AdamW, in bytes. Prints as a table.

    Attributes:
        batch_size: B.
        blocks: names of the blocks, "block_0" to "classifier".
        parameters: parameters and buffers of the cut model, heads included.
        optimizer_state: of AdamW.
        inputs: the input batch and the labels.
        gradients: of each block with its head.
        running: for each block, its peak while it runs: activations, side values, own gradients.
        updates: for each block, the optimizer's temporaries.
        passed: for each block, the values that it and earlier blocks hand on. They are held while
            the optimizer updates the block by itself.
        resident: with offloading, for each block its parameters, buffers and AdamW's state; empty
            where all blocks are on the device.
        staying: with offloading, the buffers and frozen parameters of norms, which stay on the
            device.
        backpropagation: the peak of a step of the plain model by backpropagation with AdamW, all on
            the device; None where it was not counted, or the plain model has nothing to train or
            does not run on fake tensors.
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
    staying: int = 0
    backpropagation: int | None = None

    @property
    def update(self) -> int:
        """The optimizer's temporaries for the largest block."""
        return max(self.updates)

    @property
    def held(self) -> int:
        """The bytes on the device all the time."""
        if self.resident:
            return self.inputs + self.staying
        return self.parameters + self.optimizer_state + self.inputs

    @property
    def peaks(self) -> tuple[int, ...]:
        """The peak of the step in each block, and at the end in the optimizer.

        With offloading, each block is updated by itself, so the optimizer has no entry of its own.
        """
        if self.resident:
            return tuple(self._offloaded_peaks())
        peaks = []
        gradients = 0
        for alone, own in zip(self.running, self.gradients, strict=True):
            peaks.append(self.held + gradients + alone)
            gradients += own
        peaks.append(self.held + gradients + self.update)
        return tuple(peaks)

    def _offloaded_peaks(self) -> Iterator[int]:
        for i, alone in enumerate(self.running):
            # The block itself, and the next one, which is prefetched.
            present = sum(self.resident[i : i + 2])
            # The activations are gone when the optimizer updates the block.
            updating = self.gradients[i] + self.updates[i] + self.passed[i]
            yield self.held + present + max(alone, updating)

    @property
    def peak(self) -> int:
        """The peak of the step."""
        return max(self.peaks)

    def __str__(self) -> str:
        columns = (
            Column(f"MiB, batch {self.batch_size}", align="left", width=22),
            Column("block alone", width=12),
            Column("peak of the step"),
        )
        names = (*self.blocks, "optimizer.step()")
        alone = (*self.running, self.update)
        rows = []
        # With offloading the optimizer has no peak of its own, and its name is left out.
        for name, own, peak in zip(names, alone, self.peaks, strict=False):
            rows.append((name, f"{own / MIB:.2f}", f"{peak / MIB:.2f}"))
        parameters = self.staying if self.resident else self.parameters
        lines = [
            text_table(columns, rows),
            f"held all the time: {self.held / MIB:.2f} (parameters {parameters / MIB:.2f})",
        ]
        if self.resident:
            host = sum(self.resident) / MIB
            lines.append(
                f"in host memory: {host:.2f}, "
                "of which a block and the next are copied to the device"
            )
        lines.append(self._rival())
        return "\n".join(lines)

    def _rival(self) -> str:
        """Return the line on backpropagation."""
        if self.backpropagation is None:
            return "peak by backpropagation: unknown"
        share = self.peak / self.backpropagation
        return (
            f"peak by backpropagation: {self.backpropagation / MIB:.2f} "
            f"(this step takes {share:.0%} of it)"
        )


@running("predicting memory")
@failures_unlogged()
@torch.inference_mode(False)
def footprint(
    net: nn.Module, batch_size: int, *, offloaded: bool = False, backpropagation: bool = True
) -> Footprint:
    """Predict the peak memory of a training step of a cut model for a batch size, in bytes.

    The step is `local_loss(net, x, y).backward(); optimizer.step()` with AdamW; `local_step` holds
    no more. Backpropagation's peak stands beside it, for the plain model without heads.
    `largest_batch` goes the other way, from a budget to a batch size.

    What a library keeps inside one operator is not known without running it, and is left out. An
    LSTM on a CPU is the exception: what oneDNN keeps there is found by running the layer on a few
    samples, and is known to about a tenth.

    Args:
        net: what `transform` returned; it is not touched.
        batch_size: B.
        offloaded: predict the device memory of a `local_step` once the model is offloaded
            (`offload`).
        backpropagation: whether that peak is counted as well, which takes about as long again.

    Raises:
        InputError: `net` is no cut model or is sharded, `batch_size` is no positive integer, or the
            model's forward needs the values of tensors.
    """
    cut = cut_model(net)
    make_whole(cut)
    batch_size = positive_integer("batch_size", batch_size)
    require_flag("offloaded", offloaded)
    require_flag("backpropagation", backpropagation)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    probe = fake_copy(cut, mode).train()
    with caches_restored(cut.origin.model):
        with mode, explaining_overflow(batch_size):
            predicted = fake_footprint(probe, batch_size)
        if backpropagation:
            peak = backpropagation_peak(cut, batch_size)
            predicted = replace(predicted, backpropagation=peak)
    if offloaded:
        staying = _bytes(norm_tensors(cut))
        predicted = replace(predicted, resident=_resident(cut), staying=staying)
    return predicted


@contextmanager
def explaining_overflow(batch_size: int) -> Iterator[None]:
    """Explain torch's error where a batch has more bytes than 64 bits can count.

    Raises:
        InputError: instead of that error.
    """
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError(
            f"a batch of {batch_size} samples has more bytes than can be counted. "
            "Hint: a batch size that a machine can hold"
        ) from error


@torch.enable_grad()  # a training step is predicted, wherever the caller asks
def fake_footprint(net: fx.GraphModule, batch_size: int, skip: Collection[int] = ()) -> Footprint:
    """Predict the peak of a cut model on fake parameters, inside their mode.

    Args:
        net: on fake parameters.
        batch_size: B.
        skip: indices of stages that run but are not counted.

    Raises:
        InputError: the model needs values, as for a branch on them.
    """
    plan = plan_of(net)
    device = next(net.parameters()).device
    x = constant_batch(plan.inputs, batch_size, device)
    y = plan.task.example_targets((batch_size, *plan.classifier.shape), device)
    counter = _StageCounter(net, x, y)
    learning = stages_that_learn(net)
    try:
        with counting():
            for stage in stages_of(net):
                if stage.index in skip or stage not in learning:
                    counter.skip()
                else:
                    counter.count(stage)
    except (RuntimeError, NotImplementedError) as cause:
        reason = why_values_are_needed(cause)
        if not reason:
            raise
        raise InputError(
            f"the memory of {plan.model} cannot be predicted without values: {reason}. "
            "Hint: count a real step with sffx.memory.count.count_memory"
        ) from cause
    except SffxError:
        raise
    except ValueError as cause:
        raise _refused(plan, batch_size, cause) from cause
    of_each_stage = [stage.trainable if stage in learning else [] for stage in stages_of(net)]
    trainable = list(itertools.chain.from_iterable(of_each_stage))
    return Footprint(
        batch_size=batch_size,
        blocks=tuple(stage.name for stage in stages_of(net)),
        parameters=_bytes([*net.parameters(), *net.buffers()]),
        optimizer_state=STATES * _bytes(trainable) + COUNTER * len(trainable),
        inputs=_bytes([*x, y]),
        gradients=tuple(_bytes(own) for own in of_each_stage),
        running=tuple(counter.running),
        updates=tuple(UPDATE * _largest(own) for own in of_each_stage),
        passed=tuple(counter.passed),
    )


def _refused(plan: BlockPlan, batch_size: int, cause: ValueError) -> InputError:
    """Return the error for a batch that a layer, or code of the user's own, refuses."""
    heading = f"{plan.model} cannot be trained with batch size {batch_size}"
    if str(cause).startswith(_SINGLE_VALUE):
        return InputError(f"{heading}: {cause}. Hint: pass a larger batch size")
    return InputError(
        f"{heading}: {failure_in_words(cause)}. "
        "Hint: pass a batch size that this line takes; it runs in train mode, on fake tensors"
    )


class _StageCounter:
    """Counts the bytes of one stage after the other.

    Attributes:
        running: for each stage, its peak while it runs, without parameters and the input batch; 0
            for a stage that was skipped.
        passed: for each stage, the bytes that it and earlier stages hand on; 0 likewise.
    """

    def __init__(self, net: fx.GraphModule, x: tuple[Tensor, ...], y: Tensor) -> None:
        self.running: list[int] = []
        self.passed: list[int] = []
        self._net = net
        self._plan = plan_of(net)
        self._x = x
        self._y = y
        self._held: Values = {}
        self._losses = losses_of(self._plan, [None] * len(self._plan.all_blocks))
        self._entropy = shared_entropy(self._y, self._plan.task)
        self._residency = Residency(net)
        self._walk = walk(net, training_input(net, x, y), held=self._held)
        self._sizes = _value_sizes(net)

    def skip(self) -> None:
        """Run the next stage without a backward pass."""
        with torch.no_grad():
            next(self._walk)
        self.running.append(0)
        self.passed.append(0)

    def count(self, stage: Stage) -> None:
        """Run the next stage as `local_loss` does, and count its bytes."""
        counted = count_memory(lambda: self._train(stage), model=self._net)
        # A footprint lists the parameters and the input batch apart.
        inputs = _bytes([*self._x, self._y])
        self.running.append(counted.peak - counted.parameters - inputs)
        relayed = sum(self._sizes[name] for name in _relayed(self._plan, stage.index))
        given = sum(self._sizes[value.name] for value in stage.gives)
        self.passed.append(relayed + given)

    def _train(self, stage: Stage) -> None:
        self._read_all()
        own_loss = self._losses[stage.index]
        lesson = Lesson(stage.trainable, own_loss, None, hooks_wait=False, entropy=self._entropy)
        # No name may hold the scores: they would live on during the backward pass.
        learn_stage(stage, [next(self._walk)[1]], self._y, lesson, self._residency)

    def _read_all(self) -> None:
        """Read the batch and the values that the step holds, so that all of them are counted.

        A stage need not read them. No name may hold them after this.
        """
        for tensor in (*self._x, self._y, *tree_leaves(self._held)):
            if isinstance(tensor, Tensor):
                tensor.view_as(tensor)


def _value_sizes(net: fx.GraphModule) -> dict[str, int]:
    """Return the bytes of each value that a block gives, by the value's name.

    The dict is empty at first. Each block adds its values when it runs.
    """
    sizes: dict[str, int] = {}
    for block in plan_of(net):
        net.get_submodule(block.target).register_forward_hook(_SizeNote(sizes, block))
    return sizes


@dataclass(frozen=True)
class _SizeNote(KeepsNothing):
    """A forward hook that adds the bytes of what a block returned."""

    sizes: dict[str, int]
    block: Block

    def __call__(self, module: nn.Module, args: object, returned: Any) -> None:
        # A block with side values returns a tuple.
        values = returned if self.block.sides else (returned,)
        for name, value in zip((self.block.output, *self.block.sides), values, strict=True):
            self.sizes[name] = _bytes(tree_leaves(value))


def _relayed(plan: BlockPlan, index: int) -> list[str]:
    """Return the values that pass by a block.

    They come from earlier blocks and are read by later blocks, but not by this one.
    """
    blocks = plan.all_blocks
    read_here = blocks[index].inputs
    read_later: set[str] = set()
    for block in blocks[index + 1 :]:
        read_later.update(block.inputs)
    relayed = []
    for block in blocks[:index]:
        for value in block.gives:
            if value.name in read_later and value.name not in read_here:
                relayed.append(value.name)
    return relayed


def _resident(net: fx.GraphModule) -> tuple[int, ...]:
    """Return the bytes of each stage's parameters and buffers and of AdamW's state for them."""
    learning = stages_that_learn(net)
    resident = []
    for stage in stages_of(net):
        tensors: list[Tensor] = []
        for module in stage.modules:
            tensors += [*module.parameters(), *module.buffers()]
        # Without the step counters, which stay in host memory.
        state = STATES * _bytes(stage.trainable) if stage in learning else 0
        resident.append(_bytes(tensors) + state)
    return tuple(resident)


def _largest(parameters: list[nn.Parameter]) -> int:
    return max((parameter.nbytes for parameter in parameters), default=0)


def _bytes(values: Iterable[object]) -> int:
    """Return the bytes of tensors, each storage once."""
    storages: dict[int, int] = {}
    for value in values:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
