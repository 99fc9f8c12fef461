"""Copy bytes between host memory and a device, for offloading.

On a GPU the copies run beside the computation. On other devices each copy is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Copier:
    """Copies bytes between host memory and a device, and waits for each copy.

    A copy of `StreamCopier` runs on while the caller does other things. So both begin a copy in one
    method, and finish it in another. Here the first method does all the work.

    Attributes:
        device: the device.
        pins: whether host memory is pinned.
    """

    pins = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, nbytes: int) -> Tensor:
        """Return host memory of a number of bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pins)

    def begin_load(self, host: list[Tensor]) -> list[Tensor]:
        """Begin to copy host memory to the device. The copies may be read after `finish_load`."""
        return [each.to(self.device, copy=True) for each in host]

    def finish_load(self, copies: Iterable[Tensor]) -> None:
        """Make all later computations wait for copies that `begin_load` began."""

    def begin_store(self, pairs: list[tuple[Tensor, Tensor]], freed: Iterable[Tensor]) -> None:
        """Begin to copy from the device, after all computations that are queued there.

        Args:
            pairs: of device memory and the host memory that it is copied to. The host memory may
                be read after `finish_store`.
            freed: all memory on the device that is given up.
        """
        for source, target in pairs:
            target.copy_(source)

    def finish_store(self) -> None:
        """Wait until everything is stored, and the memory that was given up is free."""


class StreamCopier(Copier):
    """Copies on two CUDA streams of its own, one for each direction, beside the computation.

    Torch's caching allocator has a part for each stream. Blocks are loaded into memory of the part
    of the inward stream. `record_stream` tells the allocator which other stream uses this memory.
    The allocator does not give it out again before that stream is done.
    """

    pins = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.inward = torch.cuda.Stream(device)
        self.outward = torch.cuda.Stream(device)

    def begin_load(self, host: list[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self.inward):
            return [each.to(self.device, non_blocking=True, copy=True) for each in host]

    def finish_load(self, copies: Iterable[Tensor]) -> None:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.inward)
        for copy in copies:
            copy.record_stream(compute)

    def begin_store(self, pairs: list[tuple[Tensor, Tensor]], freed: Iterable[Tensor]) -> None:
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        for memory in freed:
            memory.record_stream(self.outward)

    def finish_store(self) -> None:
        self.outward.synchronize()


def copier_for(device: torch.device) -> Copier:
    """Return the copier between host memory and a device."""
    return StreamCopier(device) if device.type == "cuda" else Copier(device)
