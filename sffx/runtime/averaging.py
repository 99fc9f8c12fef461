"""Average the gradients of one stage over processes, while other work goes on.

    averaging = Averaging(parameters, gradients, group)    the sums are under way
    ...                                                    other stages run
    gradients = averaging.wait()                           the means

It knows no cut model, only parameters and their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sffx.errors import InputError
from sffx.learning.shared_output import OutputCopy
from sffx.runtime.gradients import Gradients
from sffx.runtime.groups import as_bytes

# Waits for a `torch.distributed.Work`.
Wait: TypeAlias = Callable[[Any], None]

# What tensors must have in common to lie in one flat tensor.
_Kind: TypeAlias = tuple[torch.dtype, torch.device]


class Averaging:
    """Gradients and buffers of one stage on their way through the processes of a group.

    Every process must make one, with as many parameters and buffers of the same shapes, in the same
    order. Where a parameter has a gradient in some processes only, the others count as zero, as in
    `DistributedDataParallel`. Where it has none anywhere, it gets none.

    Each dtype has one flat tensor, and one sum over the processes. The gradients are copied into
    it, so the caller can let go of its own. Until `wait`, the buffers must not change.

    Args:
        parameters: whose gradients are averaged, in the same order in all processes.
        gradients: of this process, by parameter. A parameter without one counts as zero.
        group: of processes, the default group if None.
        averaged: buffers that become their mean, such as running statistics.
        copied: buffers that become those of the group's first process.

    Raises:
        InputError: a gradient is sparse.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Gradients,
        group: dist.ProcessGroup | None = None,
        averaged: Sequence[Tensor] = (),
        copied: Sequence[Tensor] = (),
    ) -> None:
        _require_dense(gradients)
        self._works: list[Any] = []
        self._buckets: list[_Bucket] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        for own_parameters, own_buffers in _by_kind(parameters, averaged):
            bucket = _Bucket(own_parameters, own_buffers, gradients, dist.get_world_size(group))
            self._buckets.append(bucket)
            self._works.append(dist.all_reduce(bucket.flat, group=group, async_op=True))
        for buffer in copied:
            copy = buffer.detach().clone(memory_format=torch.contiguous_format)
            self._copies.append((buffer, copy))
            work = dist.broadcast(as_bytes(copy), group=group, group_src=0, async_op=True)
            self._works.append(work)

    @property
    def tensors(self) -> list[Tensor]:
        """The flat tensors that are held until `wait`."""
        return [bucket.flat for bucket in self._buckets]

    @torch.no_grad()
    def wait(self, wait: Wait | None = None) -> Gradients:
        """Return the mean of each parameter's gradient, and set the buffers.

        Args:
            wait: how to wait for a `torch.distributed.Work`, its own `wait` if None.
        """
        for work in self._works:
            if wait is None:
                work.wait()
            else:
                wait(work)
        for buffer, copy in self._copies:
            buffer.copy_(copy)
        gradients: Gradients = {}
        for bucket in self._buckets:
            bucket.set_buffers()
            gradients.update(bucket.gradients())
        return gradients


def averaged_buffers(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the buffers whose mean over processes is what all their samples together would give.

    These are the running statistics of batch norms in train mode. They are linear in the statistics
    of the batches.
    """
    buffers = []
    for part in _training_parts(modules):
        if isinstance(part, _BatchNorm):
            buffers += [each for each in part.buffers(recurse=False) if each.is_floating_point()]
    return buffers


def copied_buffers(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the buffers that a training step may change otherwise in each process.

    These are all of modules in train mode but those of batch norms. A batch norm counts its batches
    alike in all processes. A copy of the output layer is the same as well, and on its way it would
    undo a newer one.
    """
    buffers: list[Tensor] = []
    for part in _training_parts(modules):
        if not isinstance(part, (_BatchNorm, OutputCopy)):
            buffers += part.buffers(recurse=False)
    return buffers


class _Bucket:
    """One flat tensor: gradients, buffers, and a number for each parameter.

    The number tells how many processes have a gradient of the parameter.

    Attributes:
        flat: to be summed over the processes. Gradients and buffers are divided by the number of
            processes before the sum, as `DistributedDataParallel` does it, so that float16 does not
            overflow.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        buffers: Sequence[Tensor],
        gradients: Gradients,
        processes: int,
    ) -> None:
        self._parameters = parameters
        self._buffers = buffers
        self._has_gradient = [parameter in gradients for parameter in parameters]
        like = (*parameters, *buffers)[0]
        size = sum(tensor.numel() for tensor in (*parameters, *buffers))
        self.flat = torch.zeros(
            size + len(parameters), dtype=_gradient_dtype(like), device=like.device
        )
        self._counts = self.flat[size:]
        self._views = list(_views(self.flat, (*parameters, *buffers)))
        self._fill(gradients, 1 / processes)

    @torch.no_grad()
    def _fill(self, gradients: Gradients, share: float) -> None:
        # The views of the buffers lie behind those of the parameters.
        for parameter, view in zip(self._parameters, self._views, strict=False):
            if parameter in gradients:
                torch.mul(gradients[parameter].detach(), share, out=view)
        if all(self._has_gradient):
            self._counts.fill_(1)
        else:
            here = self.flat.new_tensor(self._has_gradient)
            self._counts.copy_(here)
        for buffer, view in zip(self._buffers, self._buffer_views, strict=True):
            torch.mul(buffer.detach(), share, out=view)

    @property
    def _buffer_views(self) -> list[Tensor]:
        return self._views[len(self._parameters) :]

    def gradients(self) -> Gradients:
        """Return the mean gradients of the parameters that have one in any process."""
        is_used = self._has_gradient
        if not all(is_used):
            # Read here only: on a GPU it waits for the device.
            is_used = [count != 0 for count in self._counts.tolist()]
        gradients: Gradients = {}
        for parameter, view, used in zip(self._parameters, self._views, is_used, strict=False):
            if used:
                gradients[parameter] = view
        return gradients

    def set_buffers(self) -> None:
        """Set the buffers to their means."""
        for buffer, view in zip(self._buffers, self._buffer_views, strict=True):
            buffer.copy_(view)


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield a part of a flat tensor for each of some tensors, with its shape and order in memory.

    An optimizer is faster where a gradient lies in memory like its parameter.
    """
    start = 0
    for tensor in tensors:
        dense = torch.empty_like(tensor, device="meta")
        yield flat.as_strided(dense.size(), dense.stride(), start)
        start += tensor.numel()


def _by_kind(
    parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]
) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
    """Return parameters and buffers of one dtype and device each, in the same order everywhere."""
    parameters_by_kind: dict[_Kind, list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = _gradient_dtype(parameter), parameter.device
        parameters_by_kind.setdefault(kind, []).append(parameter)
    buffers_by_kind: dict[_Kind, list[Tensor]] = {}
    for buffer in buffers:
        kind = buffer.dtype, buffer.device
        buffers_by_kind.setdefault(kind, []).append(buffer)
    # A dict and not a set, whose order could differ between processes.
    kinds = dict.fromkeys([*parameters_by_kind, *buffers_by_kind])
    return [(parameters_by_kind.get(kind, []), buffers_by_kind.get(kind, [])) for kind in kinds]


def _gradient_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's gradient. A parameter may set another than its own."""
    dtype: torch.dtype | None = None
    if isinstance(tensor, nn.Parameter):
        dtype = getattr(tensor, "grad_dtype", None)  # torch 2.9 does not have it
    return tensor.dtype if dtype is None else dtype


def _require_dense(gradients: Gradients) -> None:
    """Raise an InputError if a gradient is sparse."""
    for gradient in gradients.values():
        if gradient.layout is not torch.strided:
            raise InputError(
                f"a gradient of shape {tuple(gradient.shape)} is sparse, and only dense ones are "
                "averaged over processes. Hint: make the embedding with sparse=False"
            )


def _training_parts(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules inside others, each once, that are in train mode."""
    seen: set[nn.Module] = set()
    for module in modules:
        for part in module.modules():
            if part.training and part not in seen:
                seen.add(part)
                yield part
