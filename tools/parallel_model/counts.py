"""What each block costs: counted on fake tensors, with its head and by plain backpropagation.

Every operation is seen as it is dispatched. Of matrix products and convolutions the floating-point
operations are counted, of all others the bytes that they read and write. Two batch sizes are
counted, and a line is drawn through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from sffx.compiler.fake import fake_copy
from sffx.inputs import bind, constant_batch
from sffx.kernels.batch_slices import counting
from sffx.learning.losses import block_loss
from sffx.memory.footprint import fake_footprint
from sffx.net import CutModel, plan_of
from sffx.runtime.stage import Stage, Values, stages_of
from sffx.runtime.walk import input_values, score_detached

_ATEN: Any = torch.ops.aten
# The attention of CPUs does what that of GPUs does, but torch has no formula for it.
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
_NOT_RUN = (
    "_unsafe_view",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
)


@dataclass(frozen=True)
class Line:
    """A number that grows with the samples of a batch."""

    fixed: float = 0.0
    each: float = 0.0

    def at(self, samples: float) -> float:
        """Return the number for so many samples."""
        return self.fixed + self.each * samples

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.each + other.each)

    @classmethod
    def through(cls, found: dict[int, float]) -> Line:
        """Return the line through what was found for two batch sizes. It never falls."""
        (small, at_small), (large, at_large) = sorted(found.items())
        each = max(0.0, (at_large - at_small) / (large - small))
        return cls(max(0.0, at_large - each * large), each)


@dataclass(frozen=True)
class Counted:
    """Work on a batch.

    Attributes:
        flops: of matrix products and convolutions.
        moved: bytes that other operations read and write.
        kernels: operations that are launched, if loops over parts of a batch are short.
        parts: operations that are launched if parts are as small as the package makes them.
    """

    flops: Line = Line()
    moved: Line = Line()
    kernels: Line = Line()
    parts: Line = Line()


@dataclass(frozen=True)
class BlockCost:
    """What a block costs.

    Attributes:
        parameters: bytes of the block's own.
        head: bytes of the parameters of its head.
        copies: bytes of its buffers and its head's.
        given: bytes that later blocks read.
        scoring: block, head and norm forward: local learning up to the sending.
        learning: backward through head and block.
        forward: of the block alone.
        backward: through the block, to its parameters and to what it reads.
        saved: bytes that backpropagation holds for the block.
        running: bytes that local learning holds while the block learns, its gradients included.
    """

    parameters: float
    head: float
    copies: float
    given: Line
    scoring: Counted
    learning: Counted
    forward: Counted
    backward: Counted
    saved: Line
    running: Line

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> BlockCost:
        """Return a block from what `to_json` returned."""
        values: dict[str, Any] = {}
        for name, value in record.items():
            if not isinstance(value, dict):
                values[name] = value
            elif "fixed" in value:
                values[name] = Line(**value)
            else:
                lines = {part: Line(**line) for part, line in value.items()}
                values[name] = Counted(**lines)
        return cls(**values)


class Counter(TorchDispatchMode):
    """Counts what is dispatched inside it.

    Attributes:
        flops: of matrix products and convolutions.
        moved: bytes that other operations read and write.
        kernels: operations that are no views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.moved = 0.0
        self.kernels = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = func.overloadpacket
        if func.is_view or packet.__name__ in _NOT_RUN:
            return output
        self.kernels += 1
        if packet in (_ATTENTION, _ATTENTION_BACKWARD):
            self.flops += _attention_flops(packet, args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=output)
        else:
            self.moved += _bytes([*args, *kwargs.values(), output])
        return output


def _attention_flops(packet: Any, args: Any) -> float:
    """Return the operations of an attention. Like torch's formulas, it counts no mask."""
    if packet is _ATTENTION:
        query, key, value = args[:3]
        return float(sdpa_flop(query.shape, key.shape, value.shape))
    gradient, query, key, value = args[:4]
    return float(sdpa_backward_flop(gradient.shape, query.shape, key.shape, value.shape))


def count_blocks(net: CutModel, batches: tuple[int, int]) -> list[BlockCost]:
    """Return what each block of a cut model costs, the classifier last.

    Args:
        net: what `transform` returned. It is not touched, and may be on the meta device.
        batches: two batch sizes.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    launched: dict[int, list[dict[str, Any]]] = {}
    running: dict[int, tuple[int, ...]] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    probe = fake_copy(net, mode).train()
    with mode:
        _move_to_cpu(probe)
        for batch in batches:
            found[batch] = list(_count_stages(probe, batch))
            # The package's parts suit the cache of a CPU. A device would take larger ones.
            with counting():
                launched[batch] = list(_count_stages(probe, batch))
            running[batch] = fake_footprint(probe, batch).running
    costs = []
    for i, stage in enumerate(stages_of(probe)):
        of_batches = {batch: (found[batch][i], launched[batch][i]) for batch in batches}
        held = {batch: float(running[batch][i]) for batch in batches}
        costs.append(_block_cost(stage, of_batches, held))
    return costs


def _move_to_cpu(net: nn.Module) -> None:
    """Put fake tensors on the CPU, since attention on the meta device is not that of devices."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            on_cpu = torch.empty_like(parameter, device="cpu")
            module.register_parameter(name, nn.Parameter(on_cpu, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _block_cost(
    stage: Stage,
    found: dict[int, tuple[dict[str, Any], dict[str, Any]]],
    running: dict[int, float],
) -> BlockCost:
    def line(key: str) -> Line:
        return Line.through({batch: whole[key] for batch, (whole, _) in found.items()})

    def counted(key: str) -> Counted:
        pairs = {batch: (whole[key], short[key]) for batch, (whole, short) in found.items()}
        return Counted(
            flops=Line.through({batch: whole.flops for batch, (whole, _) in pairs.items()}),
            moved=Line.through({batch: whole.moved for batch, (whole, _) in pairs.items()}),
            kernels=Line.through({batch: short.kernels for batch, (_, short) in pairs.items()}),
            parts=Line.through({batch: whole.kernels for batch, (whole, _) in pairs.items()}),
        )

    head = [] if stage.head is None else list(stage.head.parameters())
    buffers = [buffer for module in stage.modules for buffer in module.buffers()]
    return BlockCost(
        parameters=_bytes(list(stage.block.parameters())),
        head=_bytes(head),
        copies=_bytes(buffers),
        given=line("given"),
        scoring=counted("scoring"),
        learning=counted("learning"),
        forward=counted("forward"),
        backward=counted("backward"),
        saved=line("saved"),
        running=Line.through(running),
    )


def _count_stages(net: CutModel, batch: int) -> Iterator[dict[str, Any]]:
    """Yield the counts of each stage for a batch, on fake tensors."""
    plan = plan_of(net)
    device = next(net.parameters()).device
    x = constant_batch(plan.inputs, batch, device)
    y = plan.task.example_targets((batch, *plan.classifier.shape), device)
    names = [each.name for each in plan.inputs]
    values = input_values(net, bind(plan, dict(zip(names, x, strict=True))))
    for stage in stages_of(net):
        found = _count_backpropagation(stage, dict(values), y)
        found["scoring"], found["learning"] = Counter(), Counter()
        with found["scoring"]:
            scores = score_detached(stage, values)
            stage.hand_on(values)
        with found["learning"]:
            loss = block_loss(scores, y, task=stage.task)
            torch.autograd.grad(loss, stage.trainable, allow_unused=True)
        # A walk drops values that no later stage reads, so these are the ones that cross the cut.
        found["given"] = _bytes(list(values.values()))
        yield found


def _count_backpropagation(stage: Stage, values: Values, y: Tensor) -> dict[str, Any]:
    """Return the counts of a block as a part of a model that learns by backpropagation."""
    before = set(values)
    for node, value in values.items():
        # Nobody asks for the gradient of the model's own input.
        if node.op != "placeholder":
            values[node] = tree_map_only(Tensor, _with_gradient, value)
    read = [t for t in tree_leaves(list(values.values())) if _needs_gradient(t)]
    forward, backward = Counter(), Counter()
    own = {id(p) for p in stage.block.parameters()}
    with _saved(own) as saved, forward:
        outputs = _outputs(stage, values, before, y)
    gradients = [torch.ones_like(output) for output in outputs]
    with backward:
        torch.autograd.grad(
            outputs, [*stage.block.parameters(), *read], gradients, allow_unused=True
        )
    return {"forward": forward, "backward": backward, "saved": float(sum(saved.values()))}


def _outputs(stage: Stage, values: Values, before: set[fx.Node], y: Tensor) -> list[Tensor]:
    """Run a block, and return what gradients come back to; the loss for the classifier."""
    if stage.head is None:
        return [block_loss(stage.score(values), y, task=stage.task)]
    stage.run_block(values)
    computed = [value for node, value in values.items() if node not in before]
    return [tensor for tensor in tree_leaves(computed) if _needs_gradient(tensor)]


def _with_gradient(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@contextmanager
def _saved(own: set[int]) -> Iterator[dict[int, int]]:
    """Collect the bytes of the storages that autograd saves, without those of parameters."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own and not isinstance(base, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    unpack: Callable[[Tensor], Tensor] = _itself
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield sizes


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _bytes(values: list[Any]) -> float:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
