"""Two nets in one: each layer with weights has a twin of its own weights.

The first half of the rows of a batch goes through the layers, the second half through their twins.
So both nets run side by side through the same graph, and a block holds the same layers of both.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.tensors import copied

# Layers that take one value and treat each sample by itself, or the whole batch as batch norms do.
_KINDS = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.Embedding),
)

TWIN = "twin"


class TwinLayer(nn.Module):
    """What a layer with a twin does. The class of such a layer inherits from this and its own."""

    # Whether the layer works alone in eval mode, for all rows.
    answers_alone = False

    def forward(self, input: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return the layer's output of the first half of the rows, the twin's of the second.

        Args:
            input: the rows. All layers of torch call it so, and a forward may as well.
            arguments: of the layer, such as the size that a transposed convolution gives.
            options: likewise.
        """
        own = super().forward
        if self.answers_alone and not self.training:
            return own(input, *arguments, **options)
        if torch.compiler.is_exporting():
            # A program takes any number of samples, each of which has a row for both nets.
            first_rows, other_rows = input.reshape(2, -1, *input.shape[1:]).unbind()
        else:
            first = (len(input) + 1) // 2
            if first == len(input):
                return own(input, *arguments, **options)
            first_rows, other_rows = input[:first], input[first:]
        of_first = own(first_rows, *arguments, **options)
        of_other = self.get_submodule(TWIN)(other_rows, *arguments, **options)
        return torch.cat([of_first, of_other])


def _twin_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of layers of a kind that have a twin. It is an attribute of this module."""
    name = f"Twin{kind.__name__}"
    made = type(name, (TwinLayer, kind), {"__module__": __name__})
    # A pickle finds a class by its name.
    globals()[name] = made
    return made


_TWIN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {kind: _twin_class(kind) for kind in _KINDS}


def with_twins(model: nn.Module, objective: str) -> nn.Module:
    """Return a copy of a model in which each layer with weights has a twin, initialised anew.

    Args:
        model: of one net.
        objective: the name of the objective, for messages.

    Raises:
        InputError: a layer has weights, but is of no kind that can have a twin.
    """
    twins: nn.Module = copied(model)
    _require_known(twins, objective)
    # A parameter that several layers share has one twin, which the twins of these layers share.
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for layer in list(twins.modules()):
        if type(layer) in _TWIN_CLASSES:
            _add_twin(layer, shared)
    return twins


def _require_known(model: nn.Module, objective: str) -> None:
    for name, module in model.named_modules():
        has_parameters = any(isinstance(each, Tensor) for each in module._parameters.values())
        if _can_have_twin(module) or not has_parameters:
            continue
        raise InputError(
            f"the objective {objective!r} trains two nets, and {name or 'the model'!r}, a "
            f"{type(module).__name__}, has weights of its own that cannot be doubled. "
            "Hint: linear layers, convolutions, norms and embeddings can"
        )


def _can_have_twin(module: nn.Module) -> bool:
    # The older weight_norm and spectral_norm keep weights that `reset_parameters` does not know.
    return type(module) in _TWIN_CLASSES and set(module._parameters) <= {"weight", "bias"}


def _add_twin(layer: nn.Module, shared: dict[nn.Parameter, nn.Parameter]) -> None:
    """Give a layer a twin.

    Args:
        layer: of one net.
        shared: the twin of each parameter so far. Those of this layer are added.
    """
    twin = copy.deepcopy(layer)
    reset: Any = getattr(twin, "reset_parameters", None)
    if reset is not None:
        reset()
    for name, own in layer.named_parameters():
        other = twin.get_parameter(name)
        if not own.requires_grad:
            # What does not learn is given, such as a fixed filter. It is the same in both nets.
            other.data.copy_(own.data)
        setattr(twin, name, shared.setdefault(own, other))
    layer.__class__ = _TWIN_CLASSES[type(layer)]
    layer.add_module(TWIN, twin)


def answer_alone(model: nn.Module) -> None:
    """Let the layers of a model do without their twins in eval mode."""
    for module in model.modules():
        if isinstance(module, TwinLayer):
            module.answers_alone = True


def remove_twins(model: nn.Module) -> nn.Module:
    """Return the model with the first net alone. It is altered."""
    for module in list(model.modules()):
        if isinstance(module, TwinLayer):
            delattr(module, TWIN)
            vars(module).pop("answers_alone", None)
            module.__class__ = type(module).__mro__[2]
    return model
