"""Compute the gradients of one block's parameters, without touching any `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sffx.kernels.precision import full_precision
from sffx.tensors import storage_key

Gradients = dict[nn.Parameter, Tensor]

# Each is called with every gradient that a block-local step computes. `sffx.memory.count` adds one.
listeners: list[Callable[[Iterable[Tensor | None]], None]] = []


def mark_gradients(tensors: Iterable[Tensor | None]) -> None:
    """Tell all listeners that these tensors are gradients of parameters.

    A block-local step holds gradients before they reach any `.grad`. A memory counter would take
    them for activations otherwise.

    Args:
        tensors: as `torch.autograd.grad` returns them, None included.
    """
    if not listeners:
        return
    marked = list(tensors)
    for listener in listeners:
        listener(marked)


def block_gradients(
    start: Tensor, parameters: list[nn.Parameter], gradient: Tensor | None = None
) -> Gradients:
    """Return the gradient of each parameter that a loss depends on; the loss's graph is freed.

    Args:
        start: the loss, or what the loss was computed from.
        parameters: to return gradients of.
        gradient: of the loss by `start`; None for 1.
    """
    if not parameters:
        return {}
    # Autocast is for forward passes. `.backward()` runs outside of it, so this must as well.
    with full_precision(start):
        gradients = torch.autograd.grad(start, parameters, gradient, allow_unused=True)
    return _separated(parameters, gradients)


@contextmanager
def hooks_held_back(hooks: Iterable[dict[int, Any] | None]) -> Iterator[None]:
    """Keep hooks of parameters from running inside the context.

    A gradient that is computed now and handed over later must run its hooks once, when it is
    handed over.

    Args:
        hooks: the dictionaries in which parameters keep their hooks, None where there are none.
    """
    held: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for registry in hooks:
        if registry:
            held.append((registry, dict(registry)))
            registry.clear()
    try:
        yield
    finally:
        for registry, entries in held:
            registry.update(entries)


def _separated(parameters: list[nn.Parameter], gradients: Iterable[Tensor | None]) -> Gradients:
    """Return gradients by parameter, each in memory of its own.

    An optimizer or a scaler that writes in place would corrupt shared memory. Autograd shares it in
    two cases: both terms of a sum get the same tensor, and the elements of a broadcast gradient
    (stride 0) are one.
    """
    separated: Gradients = {}
    seen: set[int] = set()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        key = storage_key(gradient)
        if gradient.layout is not torch.strided:
            # The gradient of a sparse embedding. Its strides are zeros, and mean nothing.
            gradient = gradient.clone() if key in seen else gradient
        elif key in seen or 0 in gradient.stride():
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        separated[parameter] = gradient
        seen.add(key)
    return separated
