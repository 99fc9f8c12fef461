"""Weights under which a comparison says something.

No layer is zeroed, batch norms are calibrated, and outputs differ between samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sffx.tensors import as_dense, copied

_DROPPED_SHARES = ("p", "drop_prob")

# Outputs tell something where they differ by more than this between samples, relative to the
# largest output.
TELLING = 1e-4

# Where they differ by less, all weights are doubled, at most this often.
_MOST_DOUBLINGS = 4


def draw_constants(model: nn.Module) -> None:
    """Draw parameters that start as constants anew.

    A zeroed head or a layer scale of 1e-6 would hide the layers before it.
    """
    for parameter in model.parameters():
        if not _is_constant(parameter):
            continue
        with torch.no_grad():
            if parameter.flatten()[0] == 0:
                fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 100
                parameter.normal_(0, fan_in**-0.5)
            else:
                parameter.uniform_(0.5, 1.5)


def calibrate(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Set BN's running statistics to those of one batch, without which eval mode says nothing.

    Args:
        model: is in train mode afterwards.
        run: runs the model on a batch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        run(model.train())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def drop_nothing(model: nn.Module) -> None:
    """Set the shares that dropout layers drop to zero."""
    for module in model.modules():
        for share in _DROPPED_SHARES:
            if "Drop" in type(module).__name__ and hasattr(module, share):
                setattr(module, share, 0.0)


def telling_weights(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Return new values for the parameters and buffers that hide others, by name.

    Args:
        model: is copied.
        run: runs a model on a batch, and returns its logits.

    Returns:
        No values where the model does not run with them, or gives numbers that are not finite.
    """
    twin = copied(model)
    draw_constants(twin)
    try:
        calibrate(twin, run)
        logits = _telling_outputs(twin, run)
    except Exception:
        return {}
    if not logits.isfinite().all():
        return {}
    before = state_of(model)
    changed = {}
    for name, tensor in state_of(twin).items():
        # A buffer that holds a state of each sample has the shape of the last batch.
        has_shape = name in before and tensor.shape == before[name].shape
        if has_shape and not same(tensor, before[name]):
            changed[name] = tensor.detach()
    return changed


def spread(logits: Tensor) -> float:
    """Return by how much outputs differ between samples, relative to the largest of them."""
    logits = logits.detach()
    return float((logits - logits.mean(0)).abs().max() / logits.abs().max())


def _telling_outputs(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return a model's outputs in eval mode; double its weights while these hardly differ.

    The weights of a new vision transformer are small. With such weights, attention over tokens
    gives nearly the same for each sample.
    """
    logits = run(model.eval())
    for _ in range(_MOST_DOUBLINGS):
        if len(logits) < 2 or spread(logits) > TELLING:
            break
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1 and parameter.is_floating_point():
                    parameter.mul_(2)
        logits = run(model)
    return logits


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by each of their names."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    return state


def other_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter and buffer of a model, all names of the same tensor."""
    state = state_of(model)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = as_dense(a), as_dense(b)
    if a.is_floating_point() or a.is_complex():
        return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
    return torch.equal(a, b)


def _is_constant(parameter: nn.Parameter) -> bool:
    if parameter.numel() == 0 or not parameter.is_floating_point():
        return False
    first = parameter.detach().flatten()[0]
    # A single number has a meaning of its own, such as a temperature.
    if parameter.numel() == 1 and first.abs() > 1e-3:
        return False
    return bool((parameter == first).all())
