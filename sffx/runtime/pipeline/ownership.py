"""Which process owns which parts of a cut model, and how it lets go of all others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sffx.errors import InputError
from sffx.net import CutModel, plan_of
from sffx.parts import READOUT
from sffx.runtime.agreement import checksum
from sffx.runtime.gate import Gate
from sffx.runtime.stage import Stage, stages_of
from sffx.tensors import WITHOUT_VALUES, can_learn, storage_key


def parts_of(stages: Sequence[Stage], total: int) -> list[str]:
    """Return the names of the modules that a process with these stages owns.

    Args:
        stages: of the process, in order.
        total: the number of all stages of the model. The last one comes with the readout.
    """
    names: list[str] = []
    for stage in stages:
        names += [name for name in stage.parts if name not in names]
    if stages[-1].index == total - 1:
        names.append(READOUT)
    return names


def tensors_of(net: fx.GraphModule, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters and buffers of some parts by name, each tensor once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for part in parts:
        module = net.get_submodule(part)
        named = (*module.named_parameters(prefix=part), *module.named_buffers(prefix=part))
        for name, tensor in named:
            if id(tensor) not in seen:
                tensors[name] = tensor
                seen.add(id(tensor))
    return tensors


def inseparable(net: fx.GraphModule) -> dict[int, str]:
    """Return the blocks that must stay with the block before, with the tensor that ties them.

    The blocks are given by index. A parameter or a buffer of several blocks must be on one process.
    So must tensors that share memory, and those that a head reads from another block.
    """
    # By memory and not by tensor, since a view of a parameter is another tensor.
    name_of: dict[int, str] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        name_of.setdefault(storage_key(tensor), name)
    blocks_of: dict[int, list[int]] = {}
    stages = stages_of(net)
    for stage in stages:
        for part in parts_of([stage], len(stages)):
            for tensor in _reached(net.get_submodule(part)):
                blocks_of.setdefault(storage_key(tensor), []).append(stage.index)
    tied: dict[int, str] = {}
    for key, indices in blocks_of.items():
        # A tensor that no module of the model owns is a copy on each process.
        if key not in name_of:
            continue
        # A process has blocks in a row. So what blocks 2 and 5 share ties 3 and 4 as well.
        for index in range(min(indices) + 1, max(indices) + 1):
            tied[index] = name_of[key]
    return tied


def _reached(part: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module, and of modules that it keeps without being their parent."""
    to_visit: list[nn.Module] = [part]
    seen: set[nn.Module] = set()
    while to_visit:
        module = to_visit.pop()
        if module in seen:
            continue
        seen.add(module)
        # Among them are parameters, buffers and children, and modules in a tuple that are none, as
        # `goodness="shared"` has them.
        for kept in tree_leaves(list(vars(module).values())):
            if isinstance(kept, nn.Module):
                to_visit.append(kept)
            elif isinstance(kept, Tensor):
                yield kept


def release(net: CutModel, parts: Sequence[str]) -> None:
    """Turn the tensors of some parts into meta tensors, which have a shape and no memory.

    The original model in `net.origin` has the same tensors, so it lets go of them as well. A tensor
    that no block uses stays. The parts refuse to run from now on: without values, torch's
    convolutions and linear layers return any numbers, and no error.
    """
    replaced: dict[int, Tensor] = {}
    for tensor in tensors_of(net, parts).values():
        replaced[id(tensor)] = _empty(tensor, torch.device("meta"))
    _replace_everywhere(net, replaced)
    for part in parts:
        module = net.get_submodule(part)
        _release_computed(module)
        module.register_forward_pre_hook(Gate(partial(_refuse_to_run, part), 0))


def _refuse_to_run(part: str, _: int) -> None:
    raise InputError(
        f"{part} is on another process of a pipeline, and on the meta device here. "
        "Hint: pipe.train and pipe.evaluate run all blocks; pipe.gather() returns the whole net"
    )


def _release_computed(part: nn.Module) -> None:
    """Let go of the weights that a part computes from its parameters before each forward.

    The old `torch.nn.utils.weight_norm` and `spectral_norm`, and pruning, keep such a weight as a
    plain attribute.
    """
    for module in part.modules():
        parameters = module._parameters
        for name, value in list(vars(module).items()):
            # "weight_orig" is of spectral norm and of pruning, "weight_g" of weight norm.
            is_computed = f"{name}_orig" in parameters or f"{name}_g" in parameters
            if is_computed and isinstance(value, Tensor):
                setattr(module, name, value.detach().to("meta"))


def replace(model: nn.Module, replaced: dict[int, Tensor]) -> None:
    """Put tensors in the place of others, wherever a module holds them.

    Args:
        model: to change.
        replaced: new parameters and buffers by the id of the old ones.
    """
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            _replace_in(holder, replaced)


def _replace_in(holder: dict[str, Any], replaced: dict[int, Tensor]) -> None:
    for name, tensor in holder.items():
        if id(tensor) in replaced:
            holder[name] = replaced[id(tensor)]


def _replace_everywhere(net: CutModel, replaced: dict[int, Tensor]) -> None:
    """Replace tensors in a cut model, and in its original model, which has the same ones."""
    replace(net, replaced)
    replace(net.origin.model, replaced)


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor like another one, with any values; a parameter for a parameter."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


@dataclass(frozen=True)
class Empty:
    """A tensor that was made without values; it has some once it is written to or replaced.

    Attributes:
        tensor: as it was made, filled with a mark.
        version: how often it had been written to, its mark included.
    """

    tensor: Tensor
    version: int

    @classmethod
    def marked(cls, tensor: Tensor) -> Empty:
        """Fill a tensor with its mark."""
        with torch.no_grad():
            tensor.fill_(_mark(tensor))
        return cls(tensor, tensor._version)

    def is_still_empty(self, present: Tensor | None) -> bool:
        """Return whether the tensor that has its name now has no values."""
        if present is not self.tensor or self.tensor._version != self.version:
            return False
        # Whoever writes to `tensor.data` leaves the version as it is.
        tensor = self.tensor.detach()
        if can_learn(tensor):
            return bool(torch.isnan(tensor).all())
        return bool((tensor == _mark(tensor)).all())


def _mark(tensor: Tensor) -> float | int:
    """Return what a tensor without values is filled with: NaN, or an integer that nobody draws."""
    if can_learn(tensor):
        return math.nan
    # 113 is no usual value of a counter or an index, and fits into eight bits.
    return 1 if tensor.dtype == torch.bool else 113


def materialize(net: CutModel, parts: Sequence[str], device: torch.device) -> dict[str, Empty]:
    """Move parts to a device; layers on the meta device draw new weights there.

    Args:
        net: the cut model.
        parts: the names of the parts of this process.
        device: to move to.

    Returns:
        The tensors that have no values yet by name. No layer has drawn any for them.
    """
    replaced: dict[int, Tensor] = {}
    for tensor in tensors_of(net, parts).values():
        if tensor.is_meta:
            replaced[id(tensor)] = _empty(tensor, device)
    _replace_everywhere(net, replaced)
    for part in parts:
        net.get_submodule(part).to(device)
    # By what was written and not by the layer: one may draw its weight and forget its buffers.
    marked = {id(tensor): Empty.marked(tensor) for tensor in replaced.values() if tensor.numel()}
    for part in parts:
        _draw(net.get_submodule(part), set(marked))
    still_empty: dict[str, Empty] = {}
    for name, tensor in tensors_of(net, parts).items():
        empty = marked.get(id(tensor))
        if empty is not None and empty.is_still_empty(tensor):
            still_empty[name] = empty
    return still_empty


def _draw(part: nn.Module, empty: set[int]) -> None:
    """Let each layer that has tensors without values draw them.

    Args:
        part: with the layers.
        empty: the ids of such tensors.
    """
    for module in part.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        has_empty = any(id(tensor) in empty for tensor in own)
        # The name by which torch's own layers draw their weights.
        draw: Any = getattr(module, "reset_parameters", None)
        if has_empty and callable(draw):
            draw()


def require_same_everywhere(summaries: Sequence[tuple[str, dict[str, int]]]) -> None:
    """Raise an InputError if the ranks do not hold the same cut model.

    Args:
        summaries: of all ranks, as `summary` returns them.
    """
    plan, checksums = summaries[0]
    for rank, (other_plan, other_checksums) in enumerate(summaries):
        if other_plan != plan:
            raise InputError(
                f"the model of process {rank} is cut otherwise than that of process 0:\n"
                f"{other_plan}\ninstead of\n{plan}\n"
                "Hint: make the same model with the same policy on every process"
            )
        # A tensor on the meta device has no checksum.
        on_one_side = sorted(checksums.keys() ^ other_checksums.keys())
        if on_one_side:
            name = on_one_side[0]
            without, with_values = (rank, 0) if name in checksums else (0, rank)
            raise InputError(
                f"{name} is on the meta device in process {without}, where it has no values, and "
                f"not in process {with_values}. {WITHOUT_VALUES}"
            )
        different = [name for name in checksums if checksums[name] != other_checksums[name]]
        if different:
            raise InputError(
                f"the weights of process {rank} differ from those of process 0: {different[0]} and "
                f"{len(different) - 1} others of {len(checksums)}. "
                "Hint: torch.manual_seed(0) before the model is made, or load the same checkpoint"
            )


def summary(net: CutModel) -> tuple[str, dict[str, int]]:
    """Return how a model was cut, as text, and a checksum of each of its tensors by name."""
    plan = plan_of(net)
    blocks = []
    for block in plan.all_blocks:
        blocks.append((block.target, block.nodes, block.parameters, block.gives, block.inputs))
    cut = repr((plan.record(), blocks))
    checksums = {}
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel():
            checksums[name] = checksum(tensor)
    return cut, checksums
