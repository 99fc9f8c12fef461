"""Fake twins of a module's parameters and buffers: shapes, dtypes and devices, no memory."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

from sffx.compiler.aliases import views_in_attributes
from sffx.compiler.workspace import WithWorkspaces
from sffx.tensors import find_computed, storage_key

M = TypeVar("M", bound=nn.Module)

_LOGGER_OF_TORCH = logging.getLogger("torch._subclasses.fake_tensor")

# How the messages begin by which torch logs an operation that failed on fake tensors.
_LOGGED_FAILURES = ("failed while attempting to run meta", "fake tensor raised TypeError")


def _refuse_values(*_: Any) -> Any:
    """Stand in for methods that give each value of a tensor to a function of Python."""
    raise NotImplementedError("a fake tensor has no values for a function of Python")


# torch's own would read memory that a fake tensor does not have, and end the process.
for _name in ("apply_", "map_", "map2_"):
    setattr(FakeTensor, _name, _refuse_values)


class CountingWrites(FakeTensorMode):
    """Fake tensors whose versions also count the writes of functions that are given lists.

    `torch._foreach_add_` is one. On fake tensors torch counts its writes nowhere.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.is_mutable:
            for tensors in _lists_written(func, args):
                torch.autograd.graph.increment_version(tensors)
        return result


def _lists_written(func: Any, args: Sequence[Any]) -> Iterator[Sequence[Tensor]]:
    """Yield the lists of tensors that an operation writes, given its positional arguments."""
    # An operation may be given fewer arguments than it takes.
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.is_write and isinstance(value, (list, tuple)):
            yield value


@contextmanager
def failures_unlogged() -> Iterator[None]:
    """Keep torch from printing a traceback for each operation that fails on fake tensors.

    The compiler tries sizes and layers that may fail, and goes on without them.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_LOGGED_FAILURES)

    _LOGGER_OF_TORCH.addFilter(is_other)
    try:
        yield
    finally:
        _LOGGER_OF_TORCH.removeFilter(is_other)


def ones_like(tensor: Tensor) -> Tensor:
    """Return ones with values, also for a fake tensor, of which `torch.ones_like` makes a fake."""
    return torch.ones(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def fake_copy(module: M, mode: FakeTensorMode) -> M:
    """Return a copy of a module with fake twins of its tensors."""
    with FakeCopyMode(mode):
        twin = copy.deepcopy(module, fake_tensors(module, mode))
    need_no_values(twin)
    return twin


def need_no_values(module: nn.Module) -> None:
    """Let the layers of torch in a module on fake tensors run, which read values of some tensors.

    What they compute has the same shape, and takes the same memory.
    """
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer.forward = partial(_run_outside, layer.forward)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is None:
            layer.momentum = 0.1  # else it reads the number of batches


def _run_outside(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a recurrent layer outside of the mode of its fake tensors.

    Inside, the batch sizes of a packed sequence, which torch reads, would lose their values. An
    LSTM also gets its workspace here, which it has on real tensors.
    """
    with unset_fake_temporarily(), WithWorkspaces():
        return forward(*args, **kwargs)


def fake_copy_but_constants(module: M, mode: FakeTensorMode) -> M:
    """Return a copy of a module with fake twins of its parameters and buffers only.

    Tensors that are plain attributes are really copied: what a forward computes from these alone is
    a constant of the graph, and must have values. Views of parameters or buffers are no constants,
    and are fake as well.
    """
    copied: dict[int, Any] = dict(fake_tensors(module, mode))
    views = views_in_attributes(module).values()
    with FakeCopyMode(mode):
        # Those that `fake_tensors` leaves out. The result goes into `copied`.
        copy.deepcopy([*module.parameters(), *module.buffers(), *views], copied)
    return copy.deepcopy(module, copied)


def fake_tensors(module: nn.Module, mode: FakeTensorMode) -> dict[int, Tensor]:
    """Return fake twins by the `id` of what they stand for, as a memo for `copy.deepcopy`.

    This is many times as fast as what `FakeCopyMode` does for each tensor, since nothing is
    dispatched. It leaves to that mode what is more than a plain tensor with a storage of its own:
    a subclass, a view. A tensor computed from others, which cannot be copied, gets a twin too.
    """
    strided = {id(t): t for t in (*module.parameters(), *module.buffers()) if _is_strided(t)}
    sharing = [*strided.values(), *views_in_attributes(module).values()]
    owners = Counter(storage_key(tensor) for tensor in sharing)
    twins = {}
    for key, tensor in strided.items():
        if owners[storage_key(tensor)] == 1 and _is_whole(tensor):
            twins[key] = _twin(tensor, mode)
    for tensor in find_computed(module):
        twins[id(tensor)] = mode.from_tensor(tensor.detach())
    return twins


def _is_strided(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


def _is_whole(tensor: Tensor) -> bool:
    is_computed = type(tensor) is Tensor and tensor.requires_grad
    return tensor.untyped_storage().nbytes() == tensor.nbytes and not is_computed


def _twin(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    twin = FakeTensor(mode, meta, tensor.device)
    if isinstance(tensor, nn.Parameter):
        twin.requires_grad_(tensor.requires_grad)
        twin._is_param = True  # how torch marks a parameter of a tensor subclass
    return twin
