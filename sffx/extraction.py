"""Extraction: the plain model back, with the weights that were trained in the cut one."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from sffx.compiler.trace.flags import TrainingFlag
from sffx.kernels.pool import MemorySavingMaxPool2d
from sffx.net import plan_of
from sffx.runtime.shard import require_whole


def extract(net: fx.GraphModule) -> nn.Module:
    """Return a model of the original class with the trained weights, without heads and norms.

    Weights and buffers have their original names. With `norm="none"` the model computes what the
    cut model's classifier does. With `norm="layer"` the blocks were trained on normalised inputs,
    which the plain model does not make, so it is a start for further training.

    Args:
        net: what `transform` returned.

    Raises:
        InputError: `net` is no cut model, or is sharded.
    """
    plan = plan_of(net)
    require_whole(net)
    origin: Any = net.origin
    model: nn.Module = copy.deepcopy(origin.model)
    _remove_additions(model)
    parts = [net.get_submodule(block.target) for block in plan.all_blocks]
    for part in parts:
        _put_back_replacements(part, model)
    model.to(next(net.parameters()).device).train(net.training)
    # The model's own state dict is updated, because it carries the versions by which layers load.
    state = model.state_dict()
    for part in parts:
        for name, tensor in part.state_dict().items():
            state[name] = tensor.clone()
    model.load_state_dict(state, assign=True)  # assigning keeps the dtype of each tensor
    return model


def _remove_additions(model: nn.Module) -> None:
    """Remove the modules and buffers that the trace added."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TrainingFlag):
                delattr(module, name)
    for name in list(model._buffers):
        if name.startswith("_tensor_constant"):
            delattr(model, name)


def _put_back_replacements(part: nn.Module, model: nn.Module) -> None:
    """Copy the modules that someone put in the place of layers after the cut, such as adapters."""
    for name, module in part.named_modules():
        original = _submodule(model, name)
        if original is None or _belongs_to_the_cut(module, original):
            continue
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, copy.deepcopy(module))


def _belongs_to_the_cut(module: nn.Module, original: nn.Module) -> bool:
    """Return whether the cut itself made a module of a block in the place of the original one."""
    # A block's graph holds plain modules in the place of those that only hold other layers.
    made_by_the_cut = (nn.Module, type(original), MemorySavingMaxPool2d)
    return type(module) in made_by_the_cut or isinstance(module, fx.GraphModule)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
