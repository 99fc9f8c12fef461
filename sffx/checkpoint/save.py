"""Write a checkpoint."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only

from sffx.checkpoint.entries import (
    KEYS,
    OPTIMIZER_KEY,
    STATE_KEY,
    own_entries,
    with_plain_numbers,
)
from sffx.errors import InputError
from sffx.files import as_path, writing
from sffx.nested import holds_itself
from sffx.net import unwrapped
from sffx.runtime.find_residency import make_whole, require_values
from sffx.runtime.optimizers import require_optimizers_of


def save_checkpoint(
    path: str | os.PathLike[str],
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    accuracy: Mapping[str, float] | None = None,
    **more: Any,
) -> Path:
    """Write a checkpoint that `load_checkpoint`, `sffx-viz` and `sffx-export` read.

    The file is replaced as a whole. If anything fails, an older file stays as it was.

    Args:
        path: of the file.
        net: what `sffx.transform` returned, or a plain model.
        optimizer: whose state is saved.
        accuracy: of each readout, between 0 and 1, as `sffx.evaluate(net, loader).accuracy`.
        more: further entries, such as `epoch=3`: tensors, numbers, strings and containers of these.

    Returns:
        The path of the file.

    Raises:
        InputError: `net` is sharded or has tensors on the meta device, `optimizer` holds none of
            its parameters, an entry cannot be saved, or the file cannot be written.
        ExportError: the file system failed while the file was written.
    """
    path = as_path(path)
    if not isinstance(net, nn.Module):
        raise InputError(f"net is a {type(net).__name__}, not a model. Hint: pass the model itself")
    model = _unwrapped(net)
    make_whole(model)
    require_values(model)
    if optimizer is not None:
        require_optimizers_of(model, [optimizer])
    for name in more:
        if name in KEYS:
            raise InputError(
                f"save_checkpoint writes the entry {name!r} itself. Hint: rename yours"
            )
    content = {STATE_KEY: _state_of(model), **own_entries(model, accuracy)}
    if optimizer is not None:
        more = {OPTIMIZER_KEY: optimizer.state_dict(), **more}
    for name, value in more.items():
        content[name] = _readable(f"the entry {name!r}", value)
    # Torch gets an open file: when it opens the file itself, its error does not name a full disk.
    with writing(path) as draft, draft.open("wb") as file:
        torch.save(content, file)
    return path


def _unwrapped(net: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of DDP, of torch.compile and of averaged weights.

    A wrapper has no plan, and puts a prefix before the names in the state dict.
    """
    net = unwrapped(net)
    if isinstance(net, (DistributedDataParallel, nn.DataParallel, AveragedModel)):
        return _unwrapped(net.module)
    # The attribute in which torch.compile keeps the module that it wraps.
    compiled_from: nn.Module = getattr(net, "_orig_mod", net)
    return compiled_from


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model.

    Raises:
        InputError: a module adds what `load_checkpoint` could not read, by `get_extra_state`.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            state[name] = _readable(f"the state {name!r}", value)
    return state


def _readable(place: str, value: Any) -> Any:
    """Return a value as it is saved, with numbers of Python for those of numpy.

    Args:
        place: of the value, for the error.
        value: to save.

    Raises:
        InputError: `load_checkpoint` could not read it.
    """
    if holds_itself(value):
        raise InputError(
            f"{place} holds itself, or is nested too deeply. Hint: save a structure that ends"
        )
    value = with_plain_numbers(value)
    # The rules of torch's loader decide, so the value is saved and loaded once in memory. Tensors
    # of the usual kinds can be read, and may be large.
    small = tree_map_only(Tensor, _without_values, value)
    file = io.BytesIO()
    try:
        torch.save(small, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise InputError(
            f"{place} holds Python objects, which load_checkpoint would not read. "
            "Hint: save tensors, numbers, strings, and lists and mappings of these"
        ) from error
    return value


def _without_values(tensor: Tensor) -> Tensor:
    is_usual = type(tensor) in (Tensor, nn.Parameter)
    return torch.empty(0) if is_usual else tensor
