"""Likely inputs of a model for which the caller gave no example, by its first layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sffx.compiler.calls import signature
from sffx.compiler.example_dtypes import own_dtype
from sffx.errors import InputError

# Sizes to try, the most likely first.
_IMAGE_SIZES = (224, 32, 28, 64, 8, 16, 48, 96, 128, 256, 299, 384, 512)
_SIGNAL_LENGTHS = (128, 1024, 4096, 16000, 64, 32, 16, 8)
_CLIPS = ((16, 112, 112), (16, 224, 224), (8, 224, 224), (8, 64, 64), (4, 16, 16))
_TOKENS = (16, 8, 32, 128)


def only_argument(model: nn.Module) -> str:
    """Return the name of the one argument that `forward` requires, or of its first one.

    Raises:
        InputError: it requires several, or takes none by name.
    """
    named: list[str] = []
    required: list[str] = []
    for parameter in signature(model).parameters.values():
        # `**kwargs`, and `*args` behind other arguments, are none that an example is passed as.
        is_rest = parameter.kind is parameter.VAR_POSITIONAL and bool(named)
        if is_rest or parameter.kind is parameter.VAR_KEYWORD:
            continue
        named.append(parameter.name)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    if len(required) == 1:
        return required[0]
    if not required and named:
        return named[0]
    raise InputError(
        f"{type(model).__name__}.forward takes {len(required)} inputs ({', '.join(required)}), "
        "which cannot be inferred. "
        "Hint: pass example_input=(..., ...) or example_input={'name': ...}"
    )


def likely_inputs(model: nn.Module) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Yield (shape of one sample, dtype) by the first layer of a known kind, the likeliest first.

    Float inputs have the dtype of the parameters.
    """
    dtype = own_dtype(model)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            for length in _TOKENS:
                yield (length,), torch.int64
            return
        shapes = _likely_shapes(model, layer)
        for shape in shapes:
            yield shape, dtype
        if shapes:
            return


def _likely_shapes(model: nn.Module, layer: nn.Module) -> list[tuple[int, ...]]:
    """Return the likely shapes of one sample for a layer that takes floats; [] for others."""
    if isinstance(layer, nn.Conv2d):
        squares = [(size, size) for size in _IMAGE_SIZES]
        sizes = dict.fromkeys([*_image_sizes_on_record(model), *squares])
        return [(layer.in_channels, *size) for size in sizes]
    if isinstance(layer, nn.Conv1d):
        return [(layer.in_channels, length) for length in _SIGNAL_LENGTHS]
    if isinstance(layer, nn.Conv3d):
        return [(layer.in_channels, *clip) for clip in _CLIPS]
    if isinstance(layer, nn.Linear):
        return [(layer.in_features,)]
    return []


def _image_sizes_on_record(model: nn.Module) -> list[tuple[int, int]]:
    """Return the image sizes (H, W) that a model keeps among its attributes."""
    timm_config = getattr(model, "pretrained_cfg", None) or {}
    records: list[Any] = []
    if isinstance(timm_config, Mapping):
        records.append(timm_config.get("input_size", (0,))[-2:])  # (C, H, W)
    records.append(getattr(model, "image_size", None))  # torchvision
    transformers_config = getattr(model, "config", None)
    records.append(getattr(transformers_config, "image_size", None))
    sizes = []
    for record in records:
        size = (record, record) if isinstance(record, int) else record
        if isinstance(size, (tuple, list)) and len(size) == 2:
            sizes.append((size[0], size[1]))
    return sizes
