"""Example inputs for a trace: the caller's, or inferred from the first layer, on fake tensors."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from sffx.arguments import Arguments, arguments_of
from sffx.compiler.batch_axis import BATCH_SIZES, at_batch_size, batch_sizes
from sffx.compiler.calls import call, signature
from sffx.compiler.example_dtypes import DtypeWatch, have_own_dtype, other_dtypes
from sffx.compiler.fake import failures_unlogged
from sffx.compiler.likely_inputs import likely_inputs, only_argument
from sffx.errors import InputError, backbone_hint, failure_in_words
from sffx.tensors import name_on_meta, require_one_size

# What an operation raises on fake tensors when its result depends on their values. It says nothing
# against the shape of the input.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def example_arguments(
    model: nn.Module, example_input: Any, mode: FakeTensorMode, original: nn.Module
) -> tuple[Arguments, dict[str, Any]]:
    """Return the arguments of a model, and their tensors by name, as fakes of a batch.

    Args:
        model: on fake parameters.
        example_input: a tensor, a tuple of positional arguments, a mapping of keyword arguments,
            or None to infer one. The first axis of every tensor is the batch.
        mode: in which the fake tensors live.
        original: the model with values.

    Raises:
        InputError: the example does not fit `forward`, or none was given and none could be
            inferred.
    """
    if example_input is None:
        return _infer(model, mode)
    form, tensors = _bind(model, example_input)
    fakes: dict[str, Any] = {}
    for name, value in tensors.items():
        fakes[name] = _fake(model, value.shape[1:], value.dtype, mode)
    failure = _failure(model, form, fakes)
    if failure is None:
        failure = _failure_of_dtypes(model, form, fakes, original, tensors)
    if failure is None:
        return form, fakes
    hint = _cast_hint(model, form, fakes)
    if not hint:
        as_given = _at_given_size(model, form, fakes, tensors, mode)
        if as_given is not None:
            return form, as_given
    # A part that leaves torch, or that is stricter on fake tensors, may become a leaf.
    if not _runs_for_real(original, form, tensors):
        _require_fit(model, example_input)
        hint = hint or _what_to_do(model, failure, example_input)
        raise InputError(
            f"{type(model).__name__} does not run on example_input ({_shapes(tensors)}): "
            f"{failure_in_words(failure)}. Hint: {hint}"
        ) from failure
    return form, fakes


def _at_given_size(
    model: nn.Module,
    form: Arguments,
    fakes: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    mode: FakeTensorMode,
) -> dict[str, Any] | None:
    """Return inputs of the batch size that the caller gave, None if a model refuses these as well.

    A model may take some batch sizes only, such as multiples of 16.

    Args:
        model: on fake parameters; it does not run on `fakes`.
        form: of the call.
        fakes: the inputs on fake tensors, with another batch size.
        tensors: what the caller gave.
        mode: in which fake tensors live.

    Raises:
        InputError: the first axes of the tensors are no batch.
    """
    _require_batch_first(model, form, tensors, mode)
    if all(value.ndim == 1 for value in tensors.values()):
        # A linear layer takes a row of features as well, whose length is no batch size.
        _require_batch(model, form, tensors, mode)
    as_given = at_batch_size(fakes, batch_sizes(tensors)[0])
    if runs(model, form, as_given):
        return as_given
    _require_batch(model, form, tensors, mode)
    return None


def _failure_of_dtypes(
    model: nn.Module,
    form: Arguments,
    fakes: Mapping[str, Any],
    original: nn.Module,
    tensors: Mapping[str, Tensor],
) -> Exception | None:
    """Return the error that a model raises because it takes other dtypes, None if it raises none.

    Args:
        model: on fake parameters; it runs on these inputs.
        form: of the call.
        fakes: the inputs on fake tensors.
        original: the model with values.
        tensors: what the caller gave.
    """
    # Most inputs are floats of the dtype of the parameters, and cost no second run.
    if have_own_dtype(model, fakes) or not _is_suspicious(model, form, fakes):
        return None
    failure = _real_failure(original, form, tensors) if _has_values(original) else None
    # It may fail for other reasons, as on a single sample. Then no other dtype helps.
    return failure if failure is not None and _cast_hint(model, form, fakes) else None


def _is_suspicious(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> bool:
    """Whether a model on fakes does something that torch may refuse for the dtypes of inputs."""
    with DtypeWatch() as watch:
        _failure(model, form, values)
    return watch.is_suspicious


def _cast_hint(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> str:
    """Return how to cast inputs to dtypes that a model takes, "" where no cast makes it run.

    Args:
        model: on fake parameters.
        form: of the call.
        values: its inputs on fake tensors.
    """
    for text, changed in other_dtypes(model, values):
        if runs(model, form, changed) and not _is_suspicious(model, form, changed):
            return f"the layers take another dtype, pass {text}"
    return ""


def _require_batch_first(
    model: nn.Module, form: Arguments, tensors: Mapping[str, Tensor], mode: FakeTensorMode
) -> None:
    """Raise an InputError if a model runs as long as the first axes of its inputs differ.

    Args:
        model: on fake parameters; it does not run on inputs with equal first axes.
        form: of the call.
        tensors: what the caller gave.
        mode: in which fake tensors live.
    """
    if len({len(value) for value in tensors.values()}) == 1:
        return
    with mode:
        as_given = {name: torch.empty_like(value) for name, value in tensors.items()}
    if runs(model, form, as_given):
        raise InputError(
            f"the inputs of {type(model).__name__} differ in their first axis "
            f"({_shapes(tensors)}), and it does not run where they are equal. Hint: the first axis "
            "of every input is the batch; a forward may begin with sequence.transpose(0, 1)"
        )


def _require_batch(
    model: nn.Module, form: Arguments, tensors: Mapping[str, Tensor], mode: FakeTensorMode
) -> None:
    """Raise an InputError if a model runs on what the caller gave as on one sample of a batch.

    The arguments are those of `_require_batch_first`.
    """
    samples = {}
    for name, value in tensors.items():
        samples[name] = _fake(model, value.shape, value.dtype, mode)
    if runs(model, form, samples):
        shapes = [f"{name} {(1, *value.shape)}" for name, value in tensors.items()]
        raise InputError(
            f"example_input ({_shapes(tensors)}) has no axis for the batch, and "
            f"{type(model).__name__} takes one. Hint: the first axis is the batch, {shapes[0]}"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    """Write the shape of each tensor beside its name."""
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())


# Binding what the caller gave.


def _bind(model: nn.Module, example_input: Any) -> tuple[Arguments, dict[str, Tensor]]:
    """Return the arguments of a model as the caller gave them, and their tensors by name.

    Raises:
        InputError: they do not fit its signature, or hold no tensor with a batch axis.
    """
    form, tensors = arguments_of(_bound(model, example_input))
    if not tensors:
        raise InputError(
            f"example_input holds no tensor, got {type(example_input).__name__}. "
            "Hint: pass torch.randn(1, 3, 224, 224)"
        )
    for name, value in tensors.items():
        require_one_size(name, value)
    if any(value.ndim == 0 for value in tensors.values()):
        raise InputError(
            "example_input holds a tensor without axes. "
            "Hint: the first axis of every input is the batch"
        )
    return form, tensors


def _bound(model: nn.Module, example_input: Any) -> inspect.BoundArguments:
    """Return an example bound to the parameters of a model's forward.

    Raises:
        InputError: it does not fit them.
    """
    if isinstance(example_input, (Mapping, tuple)):
        with suppress(InputError):
            return _require_fit(model, example_input)
        with suppress(TypeError):
            # The one argument of the model may be a mapping or a tuple itself.
            return signature(model).bind(example_input)
    return _require_fit(model, example_input)


def _require_fit(model: nn.Module, example_input: Any) -> inspect.BoundArguments:
    """Return an example bound by position or by name, as its kind says.

    Raises:
        InputError: it does not fit.
    """
    positional: tuple[Any, ...] = (example_input,)
    named: Mapping[str, Any] = {}
    if isinstance(example_input, Mapping) and all(isinstance(key, str) for key in example_input):
        positional = ()
        named = example_input
    elif isinstance(example_input, tuple):
        positional = example_input
    expected = signature(model)
    try:
        return expected.bind(*positional, **named)
    except TypeError as cause:
        raise InputError(
            f"example_input does not fit {type(model).__name__}.forward{expected}: {cause}. "
            "Hint: a tensor, a tuple of positional arguments, or a dict of keyword arguments"
        ) from cause


# Inferring an input where the caller gave none.


def _infer(model: nn.Module, mode: FakeTensorMode) -> tuple[Arguments, dict[str, Any]]:
    """Return the first likely input on which the model runs.

    Raises:
        InputError: it runs on none of them, or it takes several inputs.
    """
    name = only_argument(model)
    reason = "its first layer is of no known kind"
    failure: Exception | None = None
    for shape, dtype in likely_inputs(model):
        form, values = arguments_of(_bound(model, {name: _fake(model, shape, dtype, mode)}))
        failure = _failure(model, form, values)
        if failure is None:
            return form, values
        reason = f"the last shape tried failed with: {failure_in_words(failure)}"
    raise InputError(
        f"the input shape of {type(model).__name__} cannot be inferred: {reason}. "
        f"Hint: pass example_input=torch.randn(1, ...); {_what_to_do(model, failure, None)}"
    ) from failure


# Trying an input.


def _fake(
    model: nn.Module, sample_shape: tuple[int, ...], dtype: torch.dtype, mode: FakeTensorMode
) -> Tensor:
    """Return a fake batch on the device of the model."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    device = devices[0] if devices else torch.device("cpu")
    with mode:
        return torch.empty((BATCH_SIZES[0], *sample_shape), dtype=dtype, device=device)


def runs(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> bool:
    """Whether a model on fake parameters runs on fake inputs."""
    return _failure(model, form, values) is None


def _failure(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> Exception | None:
    """Return the error that a model raises on an input, None if it runs or might run."""
    try:
        # Outside of the mode: a table that the forward makes, and may keep in a cache, has values.
        with failures_unlogged(), warnings.catch_warnings():
            # Gradient checkpointing warns when it runs without gradients.
            warnings.simplefilter("ignore")
            try_call(model, form, values)
    except DATA_DEPENDENT:
        return None
    except Exception as failure:
        return failure
    return None


def _runs_for_real(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> bool:
    """Whether a copy of the model runs on the caller's own values."""
    return _has_values(model) and _real_failure(model, form, values) is None


def _has_values(model: nn.Module) -> bool:
    """Whether a model may run on values; one on the device "meta" has none."""
    return not name_on_meta(model)


def _real_failure(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> Exception | None:
    """Return the error that a copy of the model raises on the caller's own values, None if it runs.

    Args:
        model: with values.
        form: of the call.
        values: the caller's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try_call(copy.deepcopy(model), form, values)
    except Exception as failure:
        return failure
    return None


def try_call(model: nn.Module, form: Arguments, values: Mapping[str, Any]) -> Any:
    """Return what a model returns, without gradients if it runs without them.

    A forward may compute gradients itself, or hang a hook on a value.
    """
    try:
        with torch.no_grad():
            return call(model, form, values)
    except DATA_DEPENDENT:
        raise
    except Exception:
        with torch.enable_grad():
            return call(model, form, values)


def _what_to_do(model: nn.Module, failure: Exception | None, example_input: Any) -> str:
    """Return what to do where the shape is not why a model refuses its input.

    A detector without targets is such a model.
    """
    if isinstance(example_input, list):
        return (
            "a list is one argument of the model; of a batch [x, y] of a DataLoader pass x alone, "
            "example_input=batch[0], and of a model with several inputs a tuple"
        )
    if isinstance(failure, (AssertionError, TypeError, AttributeError, KeyError)):
        return backbone_hint(model)
    return "pass inputs like those that the model is trained on"
