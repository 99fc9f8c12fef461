"""Whether two nets in one are two nets: each half of a batch must see the layers of one alone.

A layer with a twin divides the rows of what it is given. This is wrong where the rows are not those
of the batch: positions of an embedding that all samples share, tokens of a value (T, B, C). It is
no help where a forward computes with the weight of a layer and does not call the layer, or updates
a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sffx.errors import InputError
from sffx.learning.objectives.twin_layers import TWIN, TwinLayer, remove_twins
from sffx.tensors import copied

# Calls a model with its inputs, which are given by name.
Call: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], Any]

# What each layer gave, in the order of the calls: its name and a tensor. The model itself is "".
_Outputs: TypeAlias = list[tuple[str, Tensor]]

_SEED = 1

# What is added to each parameter, so that layers that begin at zero are seen as well.
_NOISE = 0.1


def require_two_nets(
    model: nn.Module, call: Call, values: Mapping[str, Any], objective: str
) -> None:
    """Raise an InputError if a model of two nets does not compute what both compute alone.

    They run on copies with random weights, in eval mode. A model that does not run on the values is
    not judged. In train mode, a buffer that belongs to both nets must stay.

    Args:
        model: with twins.
        call: of the model.
        values: of its inputs by name, (B, ...).
        objective: its name, for messages.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    both = _telling(model)
    rows = {name: torch.cat([value, value]) for name, value in values.items()}
    try:
        first = _outputs(remove_twins(copied(both)), call, values)
        second = _outputs(_second_net(both), call, values)
    except Exception:
        return
    try:
        found = _outputs(both, call, rows)
    except Exception as error:
        raise InputError(
            f"the objective {objective!r} runs two nets side by side on a batch of twice the "
            f"size, which the model does not take: {error}. Hint: objective='sff'"
        ) from error
    mixed = _first_mixed(found, first, second)
    if mixed is not None:
        layer = model.get_submodule(mixed)
        kind = type(layer).__mro__[2] if isinstance(layer, TwinLayer) else type(layer)
        raise InputError(
            f"the objective {objective!r} runs two nets side by side, each on half of the rows, "
            f"but {mixed or 'the model'!r}, a {kind.__name__}, gives values of both. Hint: layers "
            "must be called, on values with the batch first, (B, ...); positions that all samples "
            "share can be a buffer; or objective='sff'"
        )
    _require_same_buffers(both, call, rows, objective)


def _telling(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode in which no two layers have the same weights."""
    twin = copied(model).eval()
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.add_((noise * _NOISE).to(parameter.device, parameter.dtype))
    return twin


def _second_net(model: nn.Module) -> nn.Module:
    """Return the second net alone, of a model of two."""
    second: nn.Module = copied(model)
    for layer in list(second.modules()):
        if isinstance(layer, TwinLayer):
            other = layer.get_submodule(TWIN)
            for name, parameter in other.named_parameters():
                setattr(layer, name, parameter)
            for name, buffer in other.named_buffers():
                setattr(layer, name, buffer)
    return remove_twins(second)


def _outputs(model: nn.Module, call: Call, values: Mapping[str, Any]) -> _Outputs:
    """Return what each layer with weights and the model itself give."""
    outputs: _Outputs = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    # A layer behind this one may write on its output.
                    outputs.append((name, leaf.detach().clone()))

        return hook

    for name, module in model.named_modules():
        # A twin is a part of its layer.
        is_layer = bool(module._parameters) and name.rpartition(".")[2] != TWIN
        if is_layer or not name:
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        call(model, {name: value.clone() for name, value in values.items()})
    return outputs


def _require_same_buffers(
    model: nn.Module, call: Call, values: Mapping[str, Any], objective: str
) -> None:
    """Raise an InputError if a call in train mode changes a buffer that belongs to both nets."""
    of_twins: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, TwinLayer):
            of_twins.update(f"{name}.{buffer}" for buffer, _ in module.named_buffers())
    before: dict[str, Tensor] = {}
    for name, value in model.named_buffers():
        if name not in of_twins:
            before[name] = value.clone()
    with torch.random.fork_rng(), torch.no_grad():
        try:
            call(model.train(), values)
        except Exception:
            # Such as a batch norm that needs more values. A step will say so.
            return
    for name, value in model.named_buffers():
        if name in before and not torch.equal(value, before[name]):
            raise InputError(
                f"the objective {objective!r} runs two nets side by side, but the forward writes "
                f"on the buffer {name!r}, which belongs to both. Hint: objective='sff'"
            )


def _first_mixed(found: _Outputs, first: _Outputs, second: _Outputs) -> str | None:
    """Return the name of the first layer that mixes the nets, None if there is none."""
    for index, (name, value) in enumerate(found):
        if index >= min(len(first), len(second)):
            return name
        expected = torch.cat([first[index][1], second[index][1]])
        if expected.shape != value.shape or not _are_close(value, expected):
            return name
    return None


def _are_close(value: Tensor, expected: Tensor) -> bool:
    tolerance = torch.finfo(value.dtype).eps ** 0.5
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return torch.allclose(value, expected, rtol=0, atol=tolerance * scale, equal_nan=True)
