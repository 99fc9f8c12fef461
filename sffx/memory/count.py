"""Count to the byte the memory that a training step holds, on real or fake tensors."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from sffx.errors import InputError
from sffx.runtime.gradients import listeners
from sffx.tables import MIB, Column, text_table


@dataclass(frozen=True)
class MemorySplit:
    """Bytes by category.

    The order of the fields is the precedence: a storage belongs to the first category that claims
    it.

    Attributes:
        parameters: parameters and buffers of the model.
        gradients: tensors that are or were a parameter's `.grad`, and those that a block-local step
            computes.
        optimizer_state: tensors in the state of an optimizer.
        optimizer_temporaries: made and dropped inside `optimizer.step()`, such as the denominators
            of AdamW.
        activations: everything else that the step makes: values saved for backward, gradients with
            respect to activations, temporaries.
        inputs: values that the step reads but did not make (x, y, constants outside the model).
            They are held from the start.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    optimizer_temporaries: int
    activations: int
    inputs: int

    @property
    def total(self) -> int:
        """The sum over the categories."""
        return sum(getattr(self, name) for name in CATEGORIES)


CATEGORIES = tuple(field.name for field in fields(MemorySplit))


@dataclass(frozen=True)
class MemoryCount:
    """The memory of one step, in bytes. Prints as a table.

    The categories are those of `MemorySplit`. Each has its own peak here. These peaks need not fall
    together, so their sum is at least `peak`. `at_peak` is the split of `peak`.

    Attributes:
        parameters: their peak.
        gradients: their peak.
        optimizer_state: its peak.
        optimizer_temporaries: their peak.
        activations: their peak.
        inputs: their peak.
        peak: the peak of the total over time.
        at_peak: the split at the first moment when the total is at its peak.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    optimizer_temporaries: int
    activations: int
    inputs: int
    peak: int
    at_peak: MemorySplit

    def __str__(self) -> str:
        columns = (
            Column("bytes", align="left", width=22),
            Column("own peak", width=14),
            Column("at the peak", width=14),
            Column("MiB", width=8),
        )
        rows = []
        for name in CATEGORIES:
            own = getattr(self, name)
            at_peak = getattr(self.at_peak, name)
            label = name.replace("_", " ")
            rows.append((label, f"{own:,}", f"{at_peak:,}", f"{at_peak / MIB:.2f}"))
        rows.append(("total", "", f"{self.peak:,}", f"{self.peak / MIB:.2f}"))
        return text_table(columns, rows)


def count_memory(
    step: Callable[[], object], *, model: nn.Module, optimizer: Optimizer | None = None
) -> MemoryCount:
    """Run one training step and count the bytes of every tensor storage that it holds.

    The step really runs. It changes gradients, parameters and optimizer state like any other step.
    Optimizer state that exists before the step is held from the start. So run one step beforehand
    to count the steady state. Fake tensors give the same count: build the model and the inputs
    under `torch._subclasses.FakeTensorMode` and call this function inside the mode.

    A storage counts with its size, once for all its views, not rounded to the allocator's blocks,
    on whatever device. An input that is a slice of a data set counts as the whole data set, since
    the slice keeps all of it alive. Garbage collection is off during the step. So the count does
    not depend on when it would run, and storages in reference cycles stay until the end.

    The count does not see: workspace that one operator makes and drops (oneDNN, cuDNN); the 0-d
    tensors of 8 bytes that torch makes of numbers, as in `x * 2`; `storage.resize_()` until an
    operator next touches the storage; threads that the step starts in Python. It sees autograd's
    own threads (CUDA), since the engine hands the caller's dispatch modes to them.

    Args:
        step: forward, loss, backward and, if wanted, `optimizer.step()`.
        model: its parameters, buffers and gradients have categories of their own.
        optimizer: its state has a category of its own. Any optimizer that steps inside `step` is
            seen as well, named here or not.

    Returns:
        The peaks, by category and in total.

    Raises:
        InputError: an argument is of the wrong kind, or the step uses sparse tensors or tensor
            subclasses that wrap others.
    """
    if not callable(step):
        raise InputError(
            f"step must be a callable without arguments, not {type(step).__name__}. "
            "Hint: pass the function, not its result."
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, not {type(model).__name__}. "
            "Hint: pass the model whose parameters the step trains."
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise InputError(
            f"optimizer must be a torch optimizer, not {type(optimizer).__name__}. "
            "Hint: leave it out where the step uses several, which are seen as well."
        )
    log = _StorageLog()
    with _listening(log, model):
        log.claim_state(model, optimizer)
        with log:
            step()
        log.claim_state(model, optimizer)
    return log.summarise()


@dataclass
class _Live:
    """A storage that is alive."""

    serial: int
    nbytes: int
    finalizer: weakref.finalize[Any, Any]


class _StorageLog(TorchDispatchMode):
    """Logs when each storage begins and ends.

    A storage is known by a serial number. Its address would not do: torch may give the address of a
    dead storage to a new one.

    A finalizer on the Python wrapper of a storage tells when the storage ends. The wrapper lives
    exactly as long as the C++ storage, even when only autograd's saved tensors hold the storage.
    For when Python drops the wrapper, torch hands its ownership to the C++ object, and later
    returns the same wrapper again.
    """

    def __init__(self) -> None:
        super().__init__()
        # Pairs of a serial number and a number of bytes; negative where a storage ends or shrinks.
        self._initial: list[tuple[int, int]] = []
        self._events: list[tuple[int, int]] = []
        # By serial number.
        self._category: dict[int, str] = {}
        # By address.
        self._live: dict[int, _Live] = {}
        self._serials = itertools.count()
        self._optimizers_stepping = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.tensor() makes a storage unseen, and lift_fresh then returns it. So it is a storage
        # that the step makes, although an operator reads it first.
        if func is not torch.ops.aten.lift_fresh.default:
            for operand in _tensors((args, kwargs)):
                self._note(operand, created=False)
        result = func(*args, **kwargs)
        for output in _tensors(result):
            self._note(output, created=True)
        return result

    def claim(self, candidates: object, category: str) -> None:
        """Put the storages of all tensors in a nested structure into a category.

        A storage that a category of higher precedence has claimed stays there.
        """
        for tensor in _tensors(candidates):
            serial = self._note(tensor, created=False)
            # The order of the categories is their precedence.
            present = self._category[serial]
            self._category[serial] = min(category, present, key=CATEGORIES.index)

    def claim_gradients(self, gradients: Iterable[torch.Tensor | None]) -> None:
        """Claim gradients that are in no parameter's `.grad` yet."""
        self.claim(list(gradients), "gradients")

    def claim_state(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Claim the tensors that the model and the optimizer hold at this moment."""
        self.claim([*model.parameters(), *model.buffers()], "parameters")
        self.claim([parameter.grad for parameter in model.parameters()], "gradients")
        if optimizer is not None:
            self.claim(list(optimizer.state.values()), "optimizer_state")

    def optimizer_begins(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Claim an optimizer's gradients and state before it steps; it may drop the gradients."""
        self._optimizers_stepping += 1
        for group in optimizer.param_groups:
            self.claim([parameter.grad for parameter in group["params"]], "gradients")
        self.claim(list(optimizer.state.values()), "optimizer_state")

    def optimizer_ends(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Claim the state that an optimizer has made in its step."""
        self._optimizers_stepping -= 1
        self.claim(list(optimizer.state.values()), "optimizer_state")

    def close(self) -> None:
        """Let go of the storages that are still alive."""
        for live in self._live.values():
            live.finalizer.detach()

    def summarise(self) -> MemoryCount:
        """Replay the events and keep the peaks."""
        # The log is replayed at the end, because a storage may be claimed long after it began.
        now = dict.fromkeys(CATEGORIES, 0)
        for serial, change in self._initial:
            now[self._category[serial]] += change
        own_peaks = dict(now)
        at_peak = MemorySplit(**now)
        for serial, change in self._events:
            category = self._category[serial]
            now[category] += change
            own_peaks[category] = max(own_peaks[category], now[category])
            if sum(now.values()) > at_peak.total:
                at_peak = MemorySplit(**now)
        return MemoryCount(**own_peaks, peak=at_peak.total, at_peak=at_peak)

    def _note(self, tensor: torch.Tensor, *, created: bool) -> int:
        """Begin the record of a new storage, or note its new size, and return its serial number."""
        storage = _storage_of(tensor)
        live = self._live.get(storage._cdata)
        if live is None:
            return self._begin(storage, created=created)
        if live.nbytes != storage.nbytes():
            self._events.append((live.serial, storage.nbytes() - live.nbytes))
            live.nbytes = storage.nbytes()
        return live.serial

    def _begin(self, storage: torch.UntypedStorage, *, created: bool) -> int:
        serial = next(self._serials)
        finalizer = weakref.finalize(storage, self._end, storage._cdata)
        finalizer.atexit = False
        self._live[storage._cdata] = _Live(serial, storage.nbytes(), finalizer)
        event = (serial, storage.nbytes())
        if created:
            self._events.append(event)
            self._category[serial] = self._origin()
        else:
            # An operator reads it and no operator has made it, so it was there before the step.
            self._initial.append(event)
            self._category[serial] = "inputs"
        return serial

    def _end(self, address: int) -> None:
        live = self._live.pop(address)
        self._events.append((live.serial, -live.nbytes))

    def _origin(self) -> str:
        """Return the category of a new storage as long as nothing claims it."""
        # An optimizer may call a closure, whose forward and backward pass are not the optimizer's
        # own arithmetic. Only the optimizer itself runs without gradients and without a graph task.
        in_forward = torch.is_grad_enabled()
        in_backward = torch._C._current_graph_task_id() != -1
        is_own_arithmetic = not in_forward and not in_backward
        if self._optimizers_stepping and is_own_arithmetic:
            return "optimizer_temporaries"
        return "activations"


@contextmanager
def _listening(log: _StorageLog, model: nn.Module) -> Iterator[None]:
    """Let the log hear of gradients and optimizer steps, with the garbage collector off."""

    def claim_gradient(parameter: torch.Tensor) -> None:
        log.claim(parameter.grad, "gradients")

    hooks = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(claim_gradient))
    hooks.append(register_optimizer_step_pre_hook(log.optimizer_begins))
    hooks.append(register_optimizer_step_post_hook(log.optimizer_ends))
    was_collecting = gc.isenabled()
    gc.disable()
    # Not a context variable, since threads of autograd have a context of their own.
    listeners.append(log.claim_gradients)
    try:
        yield
    finally:
        listeners.remove(log.claim_gradients)
        log.close()
        for hook in hooks:
            hook.remove()
        if was_collecting:
            gc.enable()


def _tensors(structure: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        raise InputError(
            f"the memory of a {type(tensor).__name__} with layout {tensor.layout} cannot be "
            "counted: it has no storage of its own. "
            "Hint: use dense gradients (sparse=False) and plain tensors."
        )
    return tensor.untyped_storage()
