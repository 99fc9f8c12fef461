"""Give the plain model back, with the weights that were trained in the cut one."""

from __future__ import annotations

import copy

from torch import fx, nn

from sffx.compiler.trace import TrainingFlag
from sffx.errors import InputError


def extract(net: fx.GraphModule) -> nn.Module:
    """Return a model of the original class with the trained weights and buffers under their original names; heads and norms are left behind.

    The blocks of `norm="layer"` were trained on normalised inputs, which the plain model does not make: it is a start for further
    training. With `norm="none"` it computes what the cut model's classifier does.

    Args:
        net: what `transform` returned.

    Raises:
        InputError: `net` is no cut model.
    """
    if not isinstance(net, fx.GraphModule) or not hasattr(net, "origin"):
        raise InputError(f"net is a {type(net).__name__}, not a cut model. Hint: pass what sffx.transform returned")
    model = copy.deepcopy(net.origin.model)
    _strip(model)
    like = next(net.parameters())
    model.to(like.device, like.dtype).train(net.training)
    targets = [*(block.target for block in net.plan.blocks), "classifier"]  # type: ignore[union-attr]
    state = {name: tensor for target in targets for name, tensor in net.get_submodule(target).state_dict().items()}
    model.load_state_dict(state, strict=False)
    return model


def _strip(model: nn.Module) -> None:
    """Remove what the trace added."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TrainingFlag):
                delattr(module, name)
    for name in [name for name in model._buffers if name.startswith("_tensor_constant")]:
        delattr(model, name)
