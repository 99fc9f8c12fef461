"""Example inputs for a trace: from the caller where given, else inferred from the model's first layer on fake tensors."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from sffx.errors import InputError, location, way_out

# A batch size that nothing else in a model is likely to be, so that an axis of this size, or a number read from one, is the batch.
TRACE_BATCH = 61

# What an operation raises on fake tensors when its result depends on their values. It says nothing against the shape.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)

_IMAGE_SIZES = (224, 32, 28, 64, 8, 16, 48, 96, 128, 256, 299, 384, 512)
_SIGNAL_LENGTHS = (128, 1024, 4096, 16000, 64, 32, 16, 8)
_CLIPS = ((16, 112, 112), (16, 224, 224), (8, 224, 224), (8, 64, 64), (4, 16, 16))
_TOKENS = (16, 8, 32, 128)


def example_arguments(model: nn.Module, example_input: Any, mode: FakeTensorMode) -> dict[str, Any]:
    """Return the arguments of `model.forward` by name, tensors as fake tensors of batch size `TRACE_BATCH`.

    Args:
        model: on fake parameters.
        example_input: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or None to infer one.
            The first axis of every tensor is the batch.
        mode: in which the fake tensors live.

    Raises:
        InputError: the example does not fit `forward`, or none was given and none could be inferred.
    """
    if example_input is None:
        return _inferred(model, mode)
    arguments = _bound(model, example_input)
    fakes = {name: _fake(value, mode, _device(model)) for name, value in arguments.items()}
    failure = _failure(model, fakes, mode)
    if failure is None:
        return fakes
    shapes = ", ".join(
        f"{name} {tuple(value.shape)}"
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    )
    raise InputError(
        f"{type(model).__name__} does not run on example_input ({shapes}): {_told(failure)}{_hint(model, failure)}"
    ) from failure


def _bound(model: nn.Module, example_input: Any) -> dict[str, Any]:
    positional = (
        ()
        if isinstance(example_input, Mapping)
        else example_input
        if isinstance(example_input, tuple)
        else (example_input,)
    )
    keyword = example_input if isinstance(example_input, Mapping) else {}
    try:
        arguments = _named(inspect.signature(model.forward).bind(*positional, **keyword))
    except TypeError as cause:
        raise InputError(
            f"example_input does not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {cause}. "
            "Hint: a tensor, a tuple of positional arguments, or a dict of keyword arguments"
        ) from cause
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if not tensors:
        raise InputError(
            f"example_input holds no tensor, got {type(example_input).__name__}. Hint: pass torch.randn(1, 3, 224, 224)"
        )
    if any(value.ndim == 0 for value in tensors):
        raise InputError(
            "example_input holds a tensor without axes. Hint: the first axis of every input is the batch"
        )
    return arguments


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments by name, those that `**kwargs` collects among them."""
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    collected = {
        name: value
        for name, value in bound.arguments.items()
        if kinds[name] is inspect.Parameter.VAR_KEYWORD
    }
    plain = {name: value for name, value in bound.arguments.items() if name not in collected}
    return {
        **plain,
        **{name: value for values in collected.values() for name, value in values.items()},
    }


def _fake(value: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty((TRACE_BATCH, *value.shape[1:]), dtype=value.dtype, device=device)


def _inferred(model: nn.Module, mode: FakeTensorMode) -> dict[str, Any]:
    name = _single_argument(model)
    failure: Exception | None = None
    for shape, dtype in _candidates(model):
        with mode:
            arguments = {
                name: torch.empty((TRACE_BATCH, *shape), dtype=dtype, device=_device(model))
            }
        failure = _failure(model, arguments, mode)
        if failure is None:
            return arguments
    why = (
        f"the last shape tried failed with: {_told(failure)}"
        if failure
        else "its first layer is of no known kind"
    )
    hint = ". Hint: pass example_input=torch.randn(1, ...)"
    raise InputError(
        f"the input shape of {type(model).__name__} cannot be inferred: {why}{hint}{_hint(model, failure)}"
    ) from failure


def _single_argument(model: nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    named = [
        p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD
    ]
    if len(required) == 1:
        return required[0]
    if not required and named:
        return named[0]
    raise InputError(
        f"{type(model).__name__}.forward takes {len(required)} inputs ({', '.join(required)}), which cannot be inferred. "
        "Hint: pass example_input=(..., ...) or example_input={'name': ...}"
    )


def _candidates(model: nn.Module) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Yield (shape of one sample, dtype), the most likely first; float inputs take the dtype of the parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            sizes = (*_image_size_hints(model), *((size, size) for size in _IMAGE_SIZES))
            yield from (((layer.in_channels, *size), dtype) for size in dict.fromkeys(sizes))
        elif isinstance(layer, nn.Conv1d):
            yield from (((layer.in_channels, length), dtype) for length in _SIGNAL_LENGTHS)
        elif isinstance(layer, nn.Conv3d):
            yield from (((layer.in_channels, *clip), dtype) for clip in _CLIPS)
        elif isinstance(layer, nn.Linear):
            yield (layer.in_features,), dtype
        elif isinstance(layer, nn.Embedding):
            yield from (((length,), torch.int64) for length in _TOKENS)
        else:
            continue
        return


def _image_size_hints(model: nn.Module) -> list[tuple[int, int]]:
    """Read the image size where torchvision ("image_size"), timm ("pretrained_cfg") and transformers ("config") keep it."""
    config = getattr(model, "pretrained_cfg", None) or {}
    hints = [
        config.get("input_size", (0,))[-2:] if isinstance(config, Mapping) else None,
        getattr(model, "image_size", None),
        getattr(getattr(model, "config", None), "image_size", None),
    ]
    sizes = [(hint, hint) if isinstance(hint, int) else hint for hint in hints]
    return [
        (size[0], size[1]) for size in sizes if isinstance(size, (tuple, list)) and len(size) == 2
    ]


def _failure(
    model: nn.Module, arguments: Mapping[str, Any], mode: FakeTensorMode
) -> Exception | None:
    # A shape that does not fit is an answer here, not an event to log.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with mode, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # checkpointing does without gradients
            model.forward(
                **arguments
            )  # not the call: hooks of the model itself are no part of what is traced
    except DATA_DEPENDENT:
        return None
    except Exception as failure:
        return failure
    finally:
        logger.disabled = disabled
    return None


def _device(model: nn.Module) -> torch.device:
    return next(
        (tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu")
    )


def _told(failure: Exception) -> str:
    message = str(failure).strip()
    return f"{type(failure).__name__}: {message.splitlines()[0] if message else ''} ({location(failure)})"


def _hint(model: nn.Module, failure: Exception | None) -> str:
    """Return the way out where a model refuses its input for another reason than its shape, as a detector without targets does."""
    return (
        f". {way_out(model)}"
        if isinstance(failure, (AssertionError, TypeError, AttributeError, KeyError))
        else ""
    )
