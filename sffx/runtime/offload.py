"""Keep the blocks of a cut model in host memory, and on the device only those that are needed.

A block here is a stage's modules: the block and its head, with their parameters and buffers. In a
training step the optimizer's state for these parameters belongs to it, too. While a block runs, the
next one is copied to the device. When a block is done, it is copied back to host memory.

    local_step:   load(0)  prefetch(1)  step, evict  load(1)  prefetch(2)  step, evict  ...
    scores:       load(0)  prefetch(1)  evict        load(1)  prefetch(2)  evict        ...

Tensors stay the objects that they are; only their `data` is exchanged. So optimizers, parameter
groups and state dicts stay valid.

Other libraries offload in other ways. FSDP steps the optimizer on the CPU and needs a process
group. `accelerate` offloads for inference, and its hooks replace the model's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from sffx.errors import InputError
from sffx.net import plan_of, require_blocks_uncompiled
from sffx.runtime.copier import Copier, copier_for
from sffx.runtime.gate import Gate, none
from sffx.runtime.offloadable import compute_device, norm_tensors, shared_buffers
from sffx.runtime.optimizers import require_optimizers_of
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, stages_of
from sffx.tensors import storage_key

_ATTRIBUTE = "offloading"

# Memory as bytes, by the `storage_key` of the tensors that are on it.
Storages: TypeAlias = dict[int, Tensor]


@torch.inference_mode(False)
def offload(
    net: fx.GraphModule, optimizer: Optimizer, device: torch.device | str | None = None
) -> None:
    """Move a cut model and its optimizer's state to host memory; `local_step` loads block by block.

    Offloading is a state of the model, not an argument of the step, because scores and checkpoints
    meet it as well. A training loop with `local_step`, `evaluate` and `state_dict` stays as it is.
    Scores, from `evaluate` or from `net(x)` under `torch.no_grad()`, are computed block by block in
    the same way. `local_loss` and `sff_loss(net(x), y)` are refused, since they give gradients to
    all blocks at once.

    Between two calls the whole model is in host memory, pinned where the device is a GPU. State
    dicts can be saved and loaded. If a forward raises, its block leaves the device at the next
    call. Copies of the model, and with them `extract` and the exports, are of an ordinary model in
    host memory. A buffer that several blocks share stays on the device, and so do the buffers of
    norms. Where host memory does not suffice, the model goes back to the device.

    On a GPU, copies run beside the computation, and `local_step` returns when the last block is in
    host memory. On other devices each copy is waited for.

    Args:
        net: what `transform` returned. Gradients that it holds are dropped.
        optimizer: over parameters of `net`, before or after its first step.
        device: where blocks run and inputs must be; the device of `net` if None. A model on the CPU
            can be offloaded for a device that it would not fit on.

    Raises:
        InputError: `net` is no cut model, is offloaded already, lies on several devices or on
            another than `device`, has a parameter in two blocks or one that is no plain tensor, or
            the optimizer holds none of its parameters.
    """
    plan_of(net)
    require_blocks_uncompiled(net, "sffx.offload")
    if offloading_of(net) is not None:
        raise InputError(
            "net is offloaded already. Hint: sffx.onload(net) before offloading it anew"
        )
    if getattr(net, "replication", None) is not None:
        raise InputError(
            "net is replicated, and then its blocks stay on the device. "
            "Hint: copy.deepcopy(net) is not replicated"
        )
    require_optimizers_of(net, [optimizer])
    device = compute_device(net, device)
    was_on_device = next(net.parameters()).device == device
    offloading = Offloading(net, optimizer, copier_for(device))
    net.zero_grad(set_to_none=True)
    # Set before anything moves, so that `onload` can bring all back whatever ends this call.
    setattr(net, _ATTRIBUTE, offloading)
    try:
        offloading.start()
    except BaseException:
        # Host memory may not suffice, or may not be pinned.
        if was_on_device:
            onload(net)
        else:
            offloading.remove_gates()
            delattr(net, _ATTRIBUTE)
        raise


@torch.inference_mode(False)
def onload(net: fx.GraphModule) -> None:
    """Bring an offloaded model and its optimizer's state back to the device, to stay.

    Args:
        net: what `offload` was called with.

    Raises:
        InputError: `net` is not offloaded.
    """
    offloading = offloading_of(net)
    if offloading is None:
        raise InputError("net is not offloaded. Hint: sffx.offload(net, optimizer) offloads it")
    offloading.stop()
    delattr(net, _ATTRIBUTE)


def offloading_of(net: nn.Module) -> Offloading | None:
    """Return how a model is offloaded, None where it is not."""
    return getattr(net, _ATTRIBUTE, None)


@dataclass(frozen=True)
class Load:
    """The tensors of a block that are on the device, or on their way there.

    `host` and `device` have the same keys, those of the storages that the tensors are on. While the
    load is on its way, these storages are in host memory. Once it is there, they are on the device.

    Attributes:
        block: index of the block.
        tensors: those that were in host memory.
        host: their memory in host memory.
        device: their memory on the device.
    """

    block: int
    tensors: list[Tensor] = field(default_factory=list)
    host: Storages = field(default_factory=dict)
    device: Storages = field(default_factory=dict)


class Offloading(Residency):
    """The blocks of a model are in host memory.

    At most two blocks are on the device or on their way there: `loaded` and `coming`.

    Attributes:
        optimizer: its state is offloaded as well.
        copier: copies to the device and back.
        blocks: the modules of each stage, the classifier's last.
        loaded: the block on the device, if there is one.
        coming: the block on its way there, if there is one.
    """

    def __init__(self, net: fx.GraphModule, optimizer: Optimizer, copier: Copier) -> None:
        super().__init__(net)
        self.optimizer = optimizer
        self.copier = copier
        self.blocks = [stage.modules for stage in stages_of(net)]
        self.loaded: Load | None = None
        self.coming: Load | None = None
        self._is_training = False
        self._counted_on_device: set[Tensor] = set()
        self._shared_buffers = shared_buffers(net, self.blocks)
        self._norm_tensors = norm_tensors(net)
        self._hooks: list[Any] = []

    @property
    def device(self) -> torch.device:
        """The device that the blocks run on."""
        return self.copier.device

    def start(self) -> None:
        """Store all blocks in host memory, and put gates around their forwards."""
        with self._moving_optimizer_state():
            for block in range(len(self.blocks)):
                # Nothing was loaded, so the block has no host memory yet, and `evict` allocates it.
                self.loaded = Load(block)
                self.evict()
        # These do not belong to one block, so no block can bring them.
        for tensor in (*self._shared_buffers, *self._norm_tensors):
            tensor.data = tensor.data.to(self.device)
        for block, modules in enumerate(self.blocks):
            first_module, last_module = modules[0], modules[-1]
            begin = Gate(self._begin, block)
            self._hooks.append(first_module.register_forward_pre_hook(begin))
            before = Gate(self._before_forward, block)
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(before))
            after = Gate(self._after_forward, block)
            self._hooks.append(last_module.register_forward_hook(after))

    def stop(self) -> None:
        """Load all blocks to stay on the device, and remove the gates."""
        with self._moving_optimizer_state():
            for block in range(len(self.blocks)):
                self.load(block)
                # Forgotten, not evicted: the block stays.
                self.loaded = None
        self.remove_gates()

    def remove_gates(self) -> None:
        """Let forwards run without loading and evicting blocks."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def training_step(self, optimizers: Sequence[Optimizer]) -> Iterator[None]:
        """Hold a context for one `local_step`: the optimizer's state moves with the blocks.

        Raises:
            InputError: the model was offloaded with another optimizer.
        """
        if any(optimizer is not self.optimizer for optimizer in optimizers):
            raise InputError(
                "net is offloaded with another optimizer, whose state moves with it. "
                "Hint: pass that one, or onload net and offload it anew"
            )
        with self._moving_optimizer_state():
            yield

    def release(self, stage: Stage, *, changed: bool) -> None:
        """Evict a stage that has run, unless its gate has evicted it already.

        Outside of training the gate does so when the head has run, but a head need not run.
        """
        if self.loaded is None:
            return
        self.evict(changed=changed)
        if not self._is_training:
            self.copier.finish_store()

    @contextmanager
    def _moving_optimizer_state(self) -> Iterator[None]:
        """Let the optimizer's state move with the blocks; afterwards all is in host memory."""
        self._evict_all()
        self._counted_on_device = _counted_on_device(self.optimizer)
        self._is_training = True
        try:
            yield
        finally:
            try:
                self._evict_all()
            finally:
                self._is_training = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def prefetch(self, block: int) -> None:
        """Begin to load a block, while the block before it is on the device."""
        # The block that was evicted last must be gone, or three blocks would be on the device.
        self.copier.finish_store()
        tensors: list[Tensor] = []
        host: Storages = {}
        for tensor in self._tensors(block):
            if self._is_away(tensor):
                tensors.append(tensor)
                host[storage_key(tensor)] = _bytes(tensor)
        copies = self.copier.begin_load(list(host.values()))
        device = dict(zip(host, copies, strict=True))
        self.coming = Load(block, tensors, host, device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, block: int) -> None:
        """Have a block on the device, and no other."""
        if self.loaded is not None and self.loaded.block == block:
            return
        if self.loaded is not None:
            self.evict()
        # The wrong block is coming if the caller did not run the blocks in order.
        if self.coming is None or self.coming.block != block:
            self.coming = None
            self.prefetch(block)
        coming = self.coming
        self.coming = None
        assert coming is not None  # by the prefetch
        self.copier.finish_load(coming.device.values())
        for tensor in coming.tensors:
            tensor.data = _view(coming.device[storage_key(tensor)], tensor)
        # From now on the tensors are on storages of the device, so the keys are theirs.
        host: Storages = {}
        device: Storages = {}
        for old_key, copy in coming.device.items():
            new_key = storage_key(copy)
            host[new_key] = coming.host[old_key]
            device[new_key] = copy
        self.loaded = Load(block, coming.tensors, host, device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def evict(self, *, changed: bool = True) -> None:
        """Store the block that is on the device in host memory.

        Args:
            changed: whether the parameters may have changed. If not, they are not copied, since
                host memory still has them. Buffers are copied always: a forward pass changes
                running statistics.
        """
        load = self.loaded
        self.loaded = None
        assert load is not None  # the callers have checked it
        # More than was loaded may leave: a first step has made the state of the optimizer.
        leaving = [tensor for tensor in self._tensors(load.block) if self._is_on_device(tensor)]
        # Loaded memory is freed even if its tensors are on other memory by now.
        freed = dict(load.device)
        for tensor in leaving:
            freed[storage_key(tensor)] = _bytes(tensor)
        reusable = self._reusable(load, freed)
        host = self._host_memory(load, leaving, freed, reusable)
        # Parameters that have not changed need no copy if host memory still has them.
        to_copy = {storage_key(tensor) for tensor in leaving}
        if not changed:
            parameters = {storage_key(p) for p in self._parameters(load.block)}
            to_copy -= parameters & reusable
        pairs = [(freed[key], host[key]) for key in to_copy]
        self.copier.begin_store(pairs, freed.values())
        for tensor in leaving:
            tensor.data = _view(host[storage_key(tensor)], tensor)
        # Autocast caches casts of the block's parameters, which would stay on the device.
        torch.clear_autocast_cache()

    def _host_memory(
        self, load: Load, leaving: list[Tensor], freed: Storages, reusable: set[int]
    ) -> Storages:
        """Return host memory for each storage that leaves: where it came from, or new memory."""
        host = {key: load.host[key] for key in reusable}
        for tensor in leaving:
            key = storage_key(tensor)
            if key not in host:
                host[key] = self.copier.allocate(freed[key].nbytes)
        return host

    def _reusable(self, load: Load, freed: Storages) -> set[int]:
        """Return the storages that can go back to the memory they came from.

        They cannot if a user brought other memory, as `load_state_dict(..., assign=True)` does.
        """
        reusable = set()
        for key, host in load.host.items():
            is_on_host = host.device.type == "cpu"
            is_pinned_as_wanted = is_on_host and host.is_pinned() == self.copier.pins
            has_same_size = host.nbytes == freed[key].nbytes
            if is_pinned_as_wanted and has_same_size:
                reusable.add(key)
        return reusable

    def _begin(self, block: int) -> None:
        """Evict a block that is still there from a call that broke off, before another call runs.

        Whoever holds the model may have changed the block's parameters since, as `load_state_dict`
        does. So they are copied to host memory.
        """
        if not self._is_training and self.loaded is not None:
            self.evict()

    def _before_forward(self, block: int) -> None:
        """Load a block whose module is about to run.

        Raises:
            InputError: its parameters would get gradients that no step takes care of.
        """
        if torch.is_grad_enabled() and not self._is_training and self._learns(block):
            raise InputError(
                "net is offloaded, and then only sffx.local_step gives it gradients. "
                "Hint: torch.no_grad() around what only asks for scores, or sffx.onload(net)"
            )
        self.load(block)

    def _after_forward(self, block: int) -> None:
        """Prefetch the next block when the last module of a block has run.

        In a step, the backward pass of the block is still to come, so it stays.
        """
        is_last = block == len(self.blocks) - 1
        if not is_last:
            self.prefetch(block + 1)
        if self._is_training:
            return
        self.evict(changed=False)
        if is_last:
            self.copier.finish_store()

    def _evict_all(self) -> None:
        self.coming = None
        if self.loaded is not None:
            self.evict()
        self.copier.finish_store()

    def _learns(self, block: int) -> bool:
        return any(parameter.requires_grad for parameter in self._parameters(block))

    def _is_away(self, tensor: Tensor) -> bool:
        """Return whether a tensor must be loaded."""
        # On a CPU, device memory is host memory too, so a tensor does not show where it is.
        return self.device.type == "cpu" or not self._is_on_device(tensor)

    def _is_on_device(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def _parameters(self, block: int) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = []
        for module in self.blocks[block]:
            parameters += module.parameters()
        return parameters

    def _tensors(self, block: int) -> list[Tensor]:
        """Return the tensors that move with a block.

        They are looked up at each move, because the optimizer makes its state in its first step and
        a user may replace parameters.
        """
        parameters = self._parameters(block)
        moving: list[Tensor] = list(parameters)
        shared = {id(buffer) for buffer in self._shared_buffers}
        for module in self.blocks[block]:
            moving += [buffer for buffer in module.buffers() if id(buffer) not in shared]
        if self._is_training:
            for parameter in parameters:
                moving += self._state(parameter)
        return moving

    def _state(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the part of the optimizer's state that moves with a parameter.

        Torch keeps the step counter on the CPU, so it stays there. Fused and capturable optimizers
        have it on the device, so it moves.
        """
        state = dict(self.optimizer.state.get(parameter, {}))
        if parameter not in self._counted_on_device:
            state.pop("step", None)
        tensors = []
        for leaf in tree_leaves(list(state.values())):
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
        return tensors

    def __reduce__(self) -> Any:
        # Copies and pickles of an offloaded model are ordinary models, in host memory.
        return none, ()


def _counted_on_device(optimizer: Optimizer) -> set[Tensor]:
    """Return the parameters whose step counter torch keeps on the device."""
    counted: set[Tensor] = set()
    for group in optimizer.param_groups:
        if group.get("fused") or group.get("capturable"):
            counted.update(group["params"])
    return counted


def _bytes(tensor: Tensor) -> Tensor:
    """Return the whole storage of a tensor as bytes, not only the part that the tensor views."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())


def _view(memory: Tensor, like: Tensor) -> Tensor:
    """Return a tensor like another one, with its offset, shape and strides, on a copy's memory."""
    empty = torch.empty(0, dtype=like.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), like.storage_offset(), like.size(), like.stride())
