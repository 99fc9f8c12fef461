"""What of a cut model can be offloaded, and where it runs.

A block moves as a whole, so a tensor that several blocks read must not move with one of them.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sffx.errors import InputError, first_line, shown
from sffx.runtime.stage import stages_of
from sffx.tensors import WITHOUT_VALUES, storage_key


def compute_device(net: fx.GraphModule, device: torch.device | str | None) -> torch.device:
    """Return the device to compute on, with its index.

    Args:
        net: what `transform` returned.
        device: that was asked for; None for the one on which the model lies.

    Raises:
        InputError: the model lies elsewhere or in several places, or one of the two is the meta
            device.
    """
    tensors = (*net.parameters(), *net.buffers())
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) != 1:
        raise InputError(
            f"net lies on {', '.join(devices)}. Hint: net.to(device) before offloading it"
        )
    present = devices[0]
    # "cuda" has no index, but the device of a tensor that is made there has one: "cuda:0".
    try:
        wanted = torch.empty(0, device=present if device is None else device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(
            f"device is {shown(device)}, which cannot be used: {first_line(error)}. "
            "Hint: name one that torch has, such as 'cuda' or 'cpu'"
        ) from error
    if present == "meta" and wanted.type == "meta":
        raise InputError(f"net is on the meta device, without values. {WITHOUT_VALUES}")
    if wanted.type == "meta":
        raise InputError(
            f"device is {shown(device)}, where tensors have no values to compute with. "
            "Hint: name one that computes, such as 'cuda' or 'cpu'"
        )
    if present not in ("cpu", str(wanted)):
        raise InputError(
            f"net lies on {present}, but is to run on {wanted}. "
            f"Hint: net.to({str(wanted)!r}) before offloading it"
        )
    return wanted


def shared_buffers(net: fx.GraphModule, blocks: list[list[nn.Module]]) -> list[Tensor]:
    """Return the buffers that several blocks read.

    Args:
        net: what `transform` returned.
        blocks: the modules of each block.

    Raises:
        InputError: a parameter is shared with another block, or is no plain tensor.
    """
    names: dict[int, str] = {}
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        names[id(tensor)] = name
    blocks_on: Counter[int] = Counter()  # how many blocks have a tensor on a storage, by its key
    tensors: dict[int, Tensor] = {}
    for modules in blocks:
        of_block: dict[int, Tensor] = {}
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                _require_plain(tensor, names[id(tensor)])
                of_block[id(tensor)] = tensor
        tensors.update(of_block)
        blocks_on.update({storage_key(tensor) for tensor in of_block.values()})
    shared = [tensor for tensor in tensors.values() if blocks_on[storage_key(tensor)] > 1]
    for tensor in shared:
        if isinstance(tensor, nn.Parameter):
            raise InputError(
                f"parameter {names[id(tensor)]} belongs to several blocks. "
                "Hint: give each a copy of its own, or do not offload"
            )
    return shared


def norm_tensors(net: fx.GraphModule) -> list[Tensor]:
    """Return the buffers and the frozen parameters of the norms, which run between the blocks."""
    tensors: list[Tensor] = []
    for stage in stages_of(net):
        for norm in stage.norms:
            tensors += [*norm.parameters(), *norm.buffers()]
    return tensors


def _require_plain(tensor: Tensor, name: str) -> None:
    if tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor):
        return
    raise InputError(
        f"{name} is a {type(tensor).__name__} with layout {tensor.layout}, which cannot be "
        "offloaded. Hint: plain, dense parameters and buffers can"
    )
