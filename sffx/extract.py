"""Give the plain model back, with the weights that were trained in the cut one."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from sffx.compiler.trace import TrainingFlag
from sffx.kernels.pool import LeanMaxPool2d
from sffx.net import plan_of
from sffx.runtime.shard import require_whole


def extract(net: fx.GraphModule) -> nn.Module:
    """Return a model of the original class with the trained weights and buffers under their original names, without heads and norms.

    The blocks of `norm="layer"` were trained on normalised inputs, which the plain model does not make: it is a start for further
    training. With `norm="none"` it computes what the cut model's classifier does.

    Args:
        net: what `transform` returned.

    Raises:
        InputError: `net` is no cut model, or is sharded.
    """
    plan = plan_of(net)
    require_whole(net)
    origin: Any = net.origin
    model: nn.Module = copy.deepcopy(origin.model)
    _strip(model)
    parts = [net.get_submodule(block.target) for block in plan.all_blocks]
    for part in parts:
        _put_back(part, model)
    model.to(next(net.parameters()).device).train(net.training)
    state = model.state_dict()  # carries the versions by which some layers load
    state.update(
        {name: tensor.clone() for part in parts for name, tensor in part.state_dict().items()}
    )
    model.load_state_dict(state, assign=True)  # each tensor in its own dtype
    return model


def _put_back(part: nn.Module, model: nn.Module) -> None:
    """Give the model what was put in the place of its layers after it was cut, as adapters are."""
    for name, module in part.named_modules():
        owner, _, leaf = name.rpartition(".")
        before = _submodule(model, name)
        # A holder of layers is a plain module in a block's graph, and a lean pool is what the cut itself has put there.
        if (
            before is None
            or type(module) in (nn.Module, type(before), LeanMaxPool2d)
            or isinstance(module, fx.GraphModule)
        ):
            continue
        setattr(model.get_submodule(owner), leaf, copy.deepcopy(module))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _strip(model: nn.Module) -> None:
    """Remove what the trace added."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TrainingFlag):
                delattr(module, name)
    for name in [name for name in model._buffers if name.startswith("_tensor_constant")]:
        delattr(model, name)
