"""Checks of the arguments of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from sffx.checks import positive_integer, positive_time
from sffx.errors import InputError
from sffx.learning.shared_output import SharedOutput
from sffx.net import CutModel, cut_model, require_blocks_uncompiled, require_uncompiled
from sffx.objective import Objective, require_single_view
from sffx.runtime.find_residency import residency_of
from sffx.runtime.pipeline.ownership import Empty, tensors_of
from sffx.runtime.pipeline.places import Place
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage


def usable(net: nn.Module) -> CutModel:
    """Return the cut model; raise an InputError if it cannot be divided among processes."""
    cut = cut_model(net)
    # A compiled net is a wrapper too. The check below has a better hint for it.
    is_compiled = hasattr(net, "_orig_mod")
    if cut is not net and not is_compiled:
        raise InputError(
            f"net is a {type(net).__name__} around a cut model. Hint: pass the cut model itself"
        )
    require_uncompiled(net)
    require_blocks_uncompiled(cut, "sffx.Pipeline")
    _require_plain_input(cut.plan.objective)
    residency = residency_of(cut)
    if type(residency) is not Residency:
        raise InputError(
            f"the parameters of net are managed already, by {type(residency).__name__}. "
            "Hint: onload an offloaded net (sffx.onload), and do not shard or replicate it before"
        )
    if any(isinstance(module, SharedOutput) for module in cut.modules()):
        raise InputError(
            "the heads of net read a copy of its output layer (goodness 'shared'), which only the "
            "last process has, and a pipeline sends nothing upstream. "
            "Hint: goodness='sff' or 'mlp'"
        )
    return cut


def _require_plain_input(objective: Objective) -> None:
    """Raise an InputError if training or prediction runs something else than the batch itself."""
    require_single_view(objective, "a pipeline")
    if objective.makes_views:
        raise InputError(
            f"the objective {objective.name!r} makes the input of a training step by "
            "training_views, which a pipeline does not call. Hint: change the batches in the loader"
        )


def device_of(net: nn.Module, device: torch.device | str | int | None) -> torch.device:
    """Return the device that a process computes on."""
    if device is not None:
        return torch.device(device)
    own = next(net.parameters()).device
    # "meta" is no device to compute on.
    if own.type != "meta":
        return own
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def checked_depth(depth: Any) -> int:
    """Return how many batches may be on the way; raise an InputError if it is no such number."""
    return positive_integer("depth", depth, "a number of batches, 1 or more")


def checked_timeout(timeout: Any) -> timedelta:
    """Return how long to wait for a process; raise an InputError if it is no such time."""
    if timeout is None:
        return timedelta(minutes=30)
    return positive_time("timeout", timeout)


def given_cuts(
    cuts: Iterable[str], names: list[str], stages: int, tied: Mapping[int, str]
) -> list[int]:
    """Return the index of the first block of each stage, as the user names them.

    Args:
        cuts: the names of the blocks that begin a stage, without the first stage's.
        names: of all blocks.
        stages: how many there are to be.
        tied: as `inseparable` returns it.

    Raises:
        InputError: a name is unknown, there are too few or too many, or a stage would begin between
            blocks that share a weight.
    """
    given = [cuts] if isinstance(cuts, str) else list(cuts)
    # The first block begins the first stage anyway.
    unknown = [name for name in given if name not in names[1:]]
    if unknown:
        raise InputError(
            f"cuts names {', '.join(map(repr, unknown))}. "
            f"Hint: a stage can begin with {', '.join(names[1:])}"
        )
    begins = [0, *(names.index(name) for name in given)]
    if len(begins) != stages or sorted(set(begins)) != begins:
        raise InputError(
            f"cuts is {given}, for {stages} stages. "
            f"Hint: the {stages - 1} blocks, in order, that begin the stages behind the first"
        )
    for begin in begins:
        if begin in tied:
            raise InputError(
                f"{tied[begin]} is used by {names[begin - 1]} or a block before it, and by "
                f"{names[begin]} or a block behind it, so one process must have both. "
                "Hint: begin the stage with another block"
            )
    return begins


def require_loader(place: Place, loader: Iterable[Any] | None) -> None:
    """Raise an InputError unless the first stage has a loader, and it alone."""
    if place.first and loader is None:
        raise InputError(
            "this process is in the first stage of the pipeline, but its loader is None. "
            "Hint: train(loader if pipe.first else None, ...)"
        )
    if not place.first and loader is not None:
        raise InputError(
            f"this process is in stage {place.stage} of the pipeline, and only the first "
            f"stage takes a loader, not a {type(loader).__name__}. "
            "Hint: train(loader if pipe.first else None, ...)"
        )


def require_learning(stages: Iterable[Stage]) -> None:
    """Raise an InputError if training would train nothing.

    Args:
        stages: of all processes, those that are to learn.
    """
    if not torch.is_grad_enabled():
        raise InputError(
            "train was called without gradients, so it would train nothing. "
            "Hint: leave torch.no_grad() or torch.inference_mode(); pipe.evaluate returns "
            "losses there"
        )
    # The parameters of other processes are meta tensors, and say whether they learn.
    if not any(stage.trainable for stage in stages):
        raise InputError(
            "no parameter of the blocks to train requires a gradient, so train would train "
            "nothing. Hint: pipe.net.requires_grad_(True), or freeze some blocks only"
        )


def require_values(net: CutModel, parts: Sequence[str], empty: Mapping[str, Empty]) -> None:
    """Raise an InputError if tensors of a model from the meta device have no values yet.

    Args:
        net: the cut model.
        parts: of it that this process has.
        empty: those that had no values when the pipeline was made, by name.
    """
    present = tensors_of(net, parts)
    names = []
    for name, each in empty.items():
        if each.is_still_empty(present.get(name)):
            names.append(name)
    if names:
        raise InputError(
            f"{names[0]} and {len(names) - 1} other tensors have no values: the model was on "
            "the meta device, and no reset_parameters() of their layers has set them. "
            "Hint: pipe.load_state_dict(...), or set those that are in no state dict yourself: "
            "pipe.module.get_buffer(name).copy_(...)"
        )
