"""Keep the blocks of a cut model in host memory, and on the device only the block that runs and the one that comes next.

A block is its modules and its head: their parameters and buffers, and in a step what the optimizer keeps for the parameters. While a block
runs, the next one is on its way to the device; when it is done, it goes home. Tensors stay the objects that they are, their `data` is
exchanged, so optimizers, groups and state dicts hold good.

    local_step:   enter(0)  fetch(1)  step, leave  enter(1)  fetch(2)  step, leave  ...
    scores:       enter(0)  fetch(1)  leave        enter(1)  fetch(2)  leave        ...

Torch's own offloading does other things: that of FSDP steps the optimizer on the CPU and wants a process group, and the hooks of
`accelerate` serve inference and put other parameters in the place of the model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from sffx.compiler.trace import storage
from sffx.errors import InputError
from sffx.net import plan_of
from sffx.runtime.optimizers import require_optimizer_of


@torch.inference_mode(False)
def park(
    net: fx.GraphModule, optimizer: Optimizer, device: torch.device | str | None = None
) -> None:
    """Move a cut model and the state of its optimizer to host memory, from where `local_step` fetches one block after the other.

    It is a state of the model, not an argument of the step, because scores and checkpoints meet it as well: a training loop with
    `local_step`, `evaluate` and `state_dict` stays as it is. Scores, from `evaluate` or from `net(x)` under `torch.no_grad()`, are computed
    block by block in the same way. `local_loss` and `sff_loss(net(x), y)`, whose gradients of all blocks come at once, are refused.

    Between two calls all that the model holds is in host memory, pinned where the device is a GPU: state dicts can be saved and loaded.
    After a forward that raised, the block that it was in goes home at the next call.
    Copies of the model, and with them `extract` and the exports, are of an ordinary model there. A buffer of several blocks stays on the
    device. Where host memory does not suffice, the model goes back to the device. On a GPU, copies run beside the computation, and
    `local_step` returns when the last block is home; on other devices each copy is waited for.

    Args:
        net: what `transform` returned. Gradients that it holds are dropped.
        optimizer: over parameters of `net`, before or after its first step.
        device: where blocks run, which inputs are to be on; that of `net` if None. A model on the CPU can be parked for a device that it
            would not fit on.

    Raises:
        InputError: `net` is no cut model, is parked already, lies on several devices or on another than `device`, has a parameter in two
            blocks or one that is no plain tensor, or the optimizer holds none of its parameters.
    """
    plan_of(net)
    if parking_of(net) is not None:
        raise InputError("net is parked already. Hint: sffx.unpark(net) before parking it anew")
    require_optimizer_of(net, optimizer)
    device = _device(net, device)
    was_there = next(net.parameters()).device == device
    parking = Parking(net, optimizer, carrier_for(device))
    net.zero_grad(set_to_none=True)
    try:
        parking.begin()
    except BaseException:  # host memory that is not there, or cannot be pinned
        if was_there:
            parking.end()
        raise
    setattr(net, _NAME, parking)


@torch.inference_mode(False)
def unpark(net: fx.GraphModule) -> None:
    """Bring a parked model and the state of its optimizer to the device, all of it, to stay.

    Args:
        net: what `park` was called with.

    Raises:
        InputError: `net` is not parked.
    """
    parking = parking_of(net)
    if parking is None:
        raise InputError("net is not parked. Hint: sffx.park(net, optimizer) parks it")
    parking.end()
    delattr(net, _NAME)


_NAME = "parking"


def parking_of(net: nn.Module) -> Parking | None:
    """Return how a model is parked, None where it is not."""
    return getattr(net, _NAME, None)


def compute_device(net: nn.Module) -> torch.device:
    """Return the device that a model runs on, which is not where its parameters are while it is parked."""
    parking = parking_of(net)
    return parking.carrier.device if parking is not None else next(net.parameters()).device


class Carrier:
    """Copies bytes between host memory and a device, each when it is asked for.

    Attributes:
        device: the device.
        pins: whether host memory is pinned.
    """

    pins = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, nbytes: int) -> Tensor:
        """Return so many bytes of host memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pins)

    def bring(self, homes: list[Tensor]) -> list[Tensor]:
        """Begin to copy to the device; the copies may be read after `arrive`."""
        return [home.to(self.device, copy=True) for home in homes]

    def arrive(self, copies: Iterable[Tensor]) -> None:
        """Let what is computed from now on wait for what was brought."""

    def send(self, pairs: list[tuple[Tensor, Tensor]], left: Iterable[Tensor]) -> None:
        """Begin to copy each first tensor, on the device, to the second, once all that was asked of the device is done.

        Args:
            pairs: of device and host memory, which may be read after `settle`.
            left: all memory on the device that is given up.
        """
        for copy, home in pairs:
            home.copy_(copy)

    def settle(self) -> None:
        """Wait until what was sent is there and what was given up is free."""


class StreamCarrier(Carrier):
    """Copies on two CUDA streams of its own, one for each direction, beside what is computed.

    The device memory that it brings blocks in belongs to the inward stream's part of torch's caching allocator: `record_stream` tells the
    allocator who else uses it, so that it is not given out again before they are done.
    """

    pins = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def bring(self, homes: list[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self.inward):
            return [home.to(self.device, non_blocking=True, copy=True) for home in homes]

    def arrive(self, copies: Iterable[Tensor]) -> None:
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.inward)
        for copy in copies:
            copy.record_stream(compute)

    def send(self, pairs: list[tuple[Tensor, Tensor]], left: Iterable[Tensor]) -> None:
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            for copy, home in pairs:
                home.copy_(copy, non_blocking=True)
        for copy in left:
            copy.record_stream(self.outward)

    def settle(self) -> None:
        self.outward.synchronize()


def carrier_for(device: torch.device) -> Carrier:
    """Return what carries blocks to a device."""
    return StreamCarrier(device) if device.type == "cuda" else Carrier(device)


@dataclass(frozen=True)
class Cargo:
    """What of a block is on the device, or on its way there.

    Attributes:
        block: its index.
        tensors: those that were in host memory.
        homes: the bytes of their storages in host memory, by the storage: that at home while on the way, that on the device once there.
        copies: the bytes on the device, by the same.
    """

    block: int
    tensors: list[Tensor] = field(default_factory=list)
    homes: dict[int, Tensor] = field(default_factory=dict)
    copies: dict[int, Tensor] = field(default_factory=dict)


class Parking:
    """A parked model.

    Attributes:
        optimizer: whose state is parked as well.
        carrier: copies to the device and back.
        blocks: the modules of each block, the classifier's last.
        here: the block on the device, if there is one.
        ahead: the block on its way there, if there is one. There are no others.
    """

    def __init__(self, net: fx.GraphModule, optimizer: Optimizer, carrier: Carrier) -> None:
        self.optimizer, self.carrier = optimizer, carrier
        self.blocks = [
            [net.get_submodule(target) for target in part] for part in plan_of(net).parts
        ]
        self.here: Cargo | None = None
        self.ahead: Cargo | None = None
        self._stepping = False
        self._counted: set[Tensor] = set()
        self._common = _common_buffers(net, self.blocks)
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Send all blocks home, and put gates around them."""
        with self.step():
            for block in range(len(self.blocks)):
                self.here = Cargo(block)
                self.leave()
        for buffer in self._common:
            buffer.data = buffer.data.to(self.carrier.device)
        for block, modules in enumerate(self.blocks):
            self._hooks += [
                module.register_forward_pre_hook(_Gate(self._before, block)) for module in modules
            ]
            self._hooks.append(modules[-1].register_forward_hook(_Gate(self._after, block)))

    def end(self) -> None:
        """Bring all blocks to the device and leave them there, without gates."""
        with self.step():
            for block in range(len(self.blocks)):
                self.enter(block)
                self.here = None
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step: the optimizer's state moves with the blocks. Afterwards everything is at home, whatever happened."""
        self._send_all_home()
        on_device = [
            group
            for group in self.optimizer.param_groups
            if group.get("fused") or group.get("capturable")
        ]
        self._counted = {p for group in on_device for p in group["params"]}
        self._stepping = True
        try:
            yield
        finally:
            try:
                self._send_all_home()
            finally:
                self._stepping = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def fetch(self, block: int) -> None:
        """Begin to bring a block, in the room that the one before the present one has left."""
        self.carrier.settle()
        tensors = [tensor for tensor in self._tensors(block) if self._is_away(tensor)]
        homes = {storage(tensor): _bytes(tensor) for tensor in tensors}
        copies = dict(zip(homes, self.carrier.bring(list(homes.values())), strict=True))
        self.ahead = Cargo(block, tensors, homes, copies)

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter(self, block: int) -> None:
        """Have a block on the device, and none of the others."""
        if self.here is not None and self.here.block == block:
            return
        if self.here is not None:
            self.leave()
        if self.ahead is None or self.ahead.block != block:
            self.ahead = None
            self.fetch(block)
        cargo, self.ahead = self.ahead, None
        assert cargo is not None
        self.carrier.arrive(cargo.copies.values())
        for tensor in cargo.tensors:
            tensor.data = _view(cargo.copies[storage(tensor)], tensor)
        self.here = Cargo(
            block,
            cargo.tensors,
            homes={
                storage(copy): home
                for home, copy in zip(cargo.homes.values(), cargo.copies.values(), strict=True)
            },
            copies={storage(copy): copy for copy in cargo.copies.values()},
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self, *, changed: bool = True) -> None:
        """Send the block on the device home; its parameters and the optimizer's state are only copied where they may have changed."""
        assert self.here is not None
        cargo, self.here = self.here, None
        leaving = [tensor for tensor in self._tensors(cargo.block) if self._is_here(tensor)]
        left = {**cargo.copies, **{storage(tensor): _bytes(tensor) for tensor in leaving}}
        homes = {key: home for key, home in cargo.homes.items() if self._is_a_home(home, left[key])}
        as_it_was = (
            set() if changed else {storage(p) for p in self._parameters(cargo.block)} & set(homes)
        )
        for key in {storage(tensor) for tensor in leaving} - set(homes):
            homes[key] = self.carrier.host(left[key].nbytes)
        going = {storage(tensor) for tensor in leaving} - as_it_was
        self.carrier.send([(left[key], homes[key]) for key in going], left.values())
        for tensor in leaving:
            tensor.data = _view(homes[storage(tensor)], tensor)
        torch.clear_autocast_cache()  # which holds what it has cast of the block

    def _before(self, block: int) -> None:
        """Called when a module of a block is about to run.

        Raises:
            InputError: it would be given gradients that no step takes care of.
        """
        if (
            torch.is_grad_enabled()
            and not self._stepping
            and any(p.requires_grad for p in self._parameters(block))
        ):
            raise InputError(
                "net is parked, and then only sffx.local_step gives it gradients. "
                "Hint: torch.no_grad() around what only asks for scores, or sffx.unpark(net)"
            )
        self.enter(block)

    def _after(self, block: int) -> None:
        """Called when the last module of a block has run: its backward pass, in a step, comes yet."""
        is_last = block == len(self.blocks) - 1
        if not is_last:
            self.fetch(block + 1)
        if not self._stepping:
            self.leave(changed=False)
        if is_last and not self._stepping:
            self.carrier.settle()

    def _send_all_home(self) -> None:
        self.ahead = None
        if self.here is not None:
            self.leave()
        self.carrier.settle()

    def _is_away(self, tensor: Tensor) -> bool:
        """Whether a tensor has to be brought; where device and host are one, everything has."""
        return self.carrier.device.type == "cpu" or tensor.device != self.carrier.device

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device == self.carrier.device

    def _is_a_home(self, home: Tensor, copy: Tensor) -> bool:
        """Whether a storage can go where it came from."""
        return (
            home.device.type == "cpu"
            and home.is_pinned() == self.carrier.pins
            and home.nbytes == copy.nbytes
        )

    def _parameters(self, block: int) -> list[nn.Parameter]:
        return [p for module in self.blocks[block] for p in module.parameters()]

    def _tensors(self, block: int) -> list[Tensor]:
        """Return what moves with a block, as it is now."""
        parameters = self._parameters(block)
        buffers = [
            b
            for module in self.blocks[block]
            for b in module.buffers()
            if not any(b is common for common in self._common)
        ]
        state = [tensor for p in parameters for tensor in self._state(p)] if self._stepping else []
        return [*parameters, *buffers, *state]

    def _state(self, p: nn.Parameter) -> list[Tensor]:
        """Return what the optimizer keeps for a parameter, but for a step counter that torch keeps on the CPU."""
        state = self.optimizer.state.get(p, {})
        moving = [value for key, value in state.items() if key != "step" or p in self._counted]
        return [leaf for leaf in tree_leaves(moving) if isinstance(leaf, Tensor)]

    def __reduce__(self) -> Any:
        return _none, ()  # copies and pickles of a parked model are not parked


@dataclass(frozen=True)
class _Gate:
    """A hook around the forward of a block's module, which a copy of the module does not have.

    Attributes:
        call: what to call with the block.
        block: its index.
    """

    call: Callable[[int], None]
    block: int

    def __call__(self, *_: object) -> None:
        self.call(self.block)

    def __reduce__(self) -> Any:
        return _open_gate, ()


def _none() -> None:
    return None


def _open_gate() -> Callable[..., None]:
    return _pass


def _pass(*_: object) -> None:
    """What is left of a gate in a copy."""


def _device(net: fx.GraphModule, device: torch.device | str | None) -> torch.device:
    """Return the device to compute on, with its index.

    Raises:
        InputError: the model lies elsewhere, or in several places.
    """
    found = sorted({str(tensor.device) for tensor in (*net.parameters(), *net.buffers())})
    if len(found) != 1:
        raise InputError(f"net lies on {', '.join(found)}. Hint: net.to(device) before parking it")
    wanted = torch.empty(0, device=found[0] if device is None else device).device
    if found[0] not in ("cpu", str(wanted)):
        raise InputError(
            f"net lies on {found[0]}, but is to run on {wanted}. Hint: net.to({str(wanted)!r}) before parking it"
        )
    return wanted


def _common_buffers(net: fx.GraphModule, blocks: list[list[nn.Module]]) -> list[Tensor]:
    """Return the buffers that several blocks read.

    Raises:
        InputError: a parameter is, or shares its memory with, that of another block, or is no plain tensor.
    """
    names = {id(tensor): name for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    owned = [
        {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        for modules in blocks
    ]
    for tensor in (t for tensors in owned for t in tensors.values()):
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            kind = f"{type(tensor).__name__} with layout {tensor.layout}"
            raise InputError(
                f"{names[id(tensor)]} is a {kind}, which cannot be parked. Hint: plain, dense parameters and buffers can"
            )
    owners = Counter(key for tensors in owned for key in {storage(t) for t in tensors.values()})
    common = {id(t): t for tensors in owned for t in tensors.values() if owners[storage(t)] > 1}
    for tensor in common.values():
        if isinstance(tensor, nn.Parameter):
            raise InputError(
                f"parameter {names[id(tensor)]} belongs to several blocks. Hint: give each a copy of its own, or do not park"
            )
    return list(common.values())


def _bytes(tensor: Tensor) -> Tensor:
    """View the storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _view(memory: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on another storage, which is to have the same content as its own."""
    size = (like.storage_offset(), like.size(), like.stride())
    return torch.empty(0, dtype=like.dtype, device=memory.device).set_(
        memory.untyped_storage(), *size
    )
