"""The inputs of a cut model: bind them to names, take them from a loader, make example batches.

A model's input x is a tensor. If the model has several inputs, x is a tuple of positional arguments
or a mapping of keyword arguments. Every function of the package that takes x binds it here, so all
of them accept the same and refuse the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sffx.arguments import Arguments
from sffx.blocks import BlockPlan, Input
from sffx.errors import InputError, SffxError
from sffx.nested import holds_itself
from sffx.net import plan_of
from sffx.progress import length_of, reported
from sffx.tasks.task import can_be_read, has_values
from sffx.tensors import WITHOUT_VALUES, require_one_size, shapes_of_floats

_MODEL = "the model"

# Errors that say nothing about the input: the package's own, and those of memory and devices.
_UNRELATED_ERRORS = (
    SffxError,
    NotImplementedError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
)
# Parts of the messages of such errors, for those that torch raises as a plain RuntimeError.
_UNRELATED_MESSAGES = re.compile("allocate memory|same device|device type|out of memory")


def bind(plan: BlockPlan, x: Any) -> dict[str, Any]:
    """Return the value of each input of a cut model by the input's name.

    Args:
        plan: of the cut model.
        x: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments,
            nested as those of the model.

    Raises:
        InputError: there are more or fewer values than inputs, or other names; or one is a nested
            tensor.
    """
    return bind_inputs(plan.inputs, x, plan.nested)


def bind_inputs(inputs: Sequence[Input], x: Any, nested: Arguments | None = None) -> dict[str, Any]:
    """Return the value of each of some inputs by the input's name, in the order of the inputs.

    Args:
        inputs: of the model.
        x: as for `bind`.
        nested: the arguments in which the inputs lie, None where each input is one.

    Raises:
        InputError: there are more or fewer values than inputs, or other names; or one is a nested
            tensor.
    """
    values = _bound(inputs, x, nested)
    for name, value in values.items():
        require_one_size(name, value)
    return values


def _bound(inputs: Sequence[Input], x: Any, nested: Arguments | None) -> dict[str, Any]:
    """Return what `bind_inputs` returns, whatever the values are."""
    if nested is not None:
        return nested.bind(x)
    names = [each.name for each in inputs]
    if isinstance(x, Mapping):
        if set(x) != set(names):
            given = ", ".join(map(repr, x))
            wanted = ", ".join(map(repr, names))
            raise InputError(
                f"x has the keys {given or 'of no input'}, but the model takes {wanted}. "
                "Hint: pass a mapping with these keys"
            )
        return {name: x[name] for name in names}
    # A collate function makes a list of tensors. A list of numbers is not several inputs, but one
    # input of a wrong type.
    is_list_of_inputs = isinstance(x, list) and _all_tensors(x)
    values = x if isinstance(x, tuple) or is_list_of_inputs else (x,)
    if len(values) != len(names):
        raise InputError(
            f"x holds {len(values)} inputs, but the model takes {len(names)}: {', '.join(names)}. "
            "Hint: pass a tensor for each"
        )
    return dict(zip(names, values, strict=True))


def batch_size(values: Mapping[str, Any]) -> int:
    """Return the number of samples in a batch, B, given its values by name.

    Raises:
        InputError: no value is a tensor with a batch axis.
    """
    for value in values.values():
        has_batch_axis = isinstance(value, Tensor) and value.ndim > 0
        if has_batch_axis:
            return len(value)
    kinds = ", ".join(type(value).__name__ for value in values.values())
    raise InputError(
        f"x is a {kinds}, not a tensor. "
        "Hint: pass a tensor, a tuple or a mapping of tensors, the batch first"
    )


def marks_tokens(name: str, value: object) -> bool:
    """Return whether an input is an attention mask, (B, T), by the name that libraries give it.

    A float mask does not count: it may be added to attention scores, where zero marks a real token.
    """
    if not isinstance(value, Tensor) or not re.fullmatch(r"(.*_)?attention_mask", name):
        return False
    return value.ndim == 2 and not value.is_floating_point()


def padding_mask(plan: BlockPlan, values: Mapping[str, Any]) -> Tensor | None:
    """Return the input that marks the real tokens of the model's output; None if there is none.

    It is (B, T), zero at padding. Where an encoder and a decoder have a mask each, it is that of
    the decoder. A mask does not count if its length in the traced example is not the output's.

    Args:
        plan: of the cut model.
        values: of its inputs by name, as `bind` returns them.
    """
    name = plan.classifier.mask
    if not name:
        return None
    for each in plan.inputs:
        # Blocks may read an input by another name than that of the argument.
        if name == (each.value or each.name):
            mask: Tensor = values[each.name]
            return mask
    return None


def targets_of(plan: BlockPlan, x: Any, y: Any) -> Any:
    """Return the targets of a batch, without its padding.

    Args:
        plan: of the cut model.
        x: its input, as `bind` takes it.
        y: the targets.

    Raises:
        InputError: the targets have positions, and their size is that of no input and no output;
            or they are the next tokens, which the task finds by itself.
    """
    values = bind(plan, x)
    # Targets of pixels have the size of an image. Token indices say nothing about sizes.
    plan.task.require_size(y, False, shapes_of_floats(values))
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if _may_look_at(y, plan):
        comparable = [tensor for tensor in tensors if tensor.device == y.device]
        plan.task.require_inputs(y, comparable)
    return plan.task.without_padding(y, padding_mask(plan, values))


# The plans of which a batch of targets on an accelerator was looked at, by their id.
_LOOKED_AT: WeakValueDictionary[int, BlockPlan] = WeakValueDictionary()


def _may_look_at(y: Any, plan: BlockPlan) -> bool:
    """Return whether the values of a batch of targets may be compared with its inputs.

    On an accelerator this is true for the first batch of a plan only, since a look at its values
    waits for the device. Targets that are wrong are wrong in every batch.
    """
    if not isinstance(y, Tensor) or not can_be_read(y):
        return False
    if has_values(y):
        return True
    # An id may be used again after a plan is gone, so the plan itself is compared.
    is_first = _LOOKED_AT.get(id(plan)) is not plan
    _LOOKED_AT[id(plan)] = plan
    return is_first


def mask_among(inputs: Sequence[Input], values: Sequence[Any]) -> Tensor | None:
    """Return the value of the input that marks real tokens, None where there is none."""
    for each, value in zip(inputs, values, strict=True):
        if each.marks_tokens:
            mask: Tensor = value
            return mask
    return None


def batches(loader: Any) -> Iterator[Any]:
    """Return an iterator over what a loader yields. A long one says how far it is.

    Raises:
        InputError: it is nothing that can be iterated over.
    """
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise InputError(
            f"the loader is a {type(loader).__name__}, which yields nothing. "
            "Hint: pass a DataLoader or a list of pairs (x, y)"
        ) from error
    return reported(iterator, "batches", length_of(loader))


def split_batch(batch: Any, device: torch.device | None = None) -> tuple[Any, Tensor]:
    """Return x and y of what a loader yielded, on a device.

    Args:
        batch: a pair (x, y). A list x, as torch's collate function makes it, becomes a tuple.
        device: where the tensors go; None leaves them where they are.

    Raises:
        InputError: the batch is no such pair, or a tensor in it has no values.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        found = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            found += f" of {', '.join(type(each).__name__ for each in batch) or 'nothing'}"
        raise InputError(
            f"the loader yielded a {found}, not a pair (x, y) with a tensor y. "
            "Hint: wrap the loader in a generator of pairs"
        )
    x, y = batch
    if isinstance(x, list):
        x = tuple(x)
    elif isinstance(x, Mapping):
        # The tree map below does not look into a tokenizer's own kind of mapping.
        x = dict(x)
    if holds_itself(x):
        raise InputError(
            f"the loader yielded a {type(x).__name__} that holds itself as x. "
            "Hint: pass tensors, or a tuple or a mapping of tensors"
        )
    _require_values(x, y)
    if device is not None:
        x, y = tree_map_only(Tensor, lambda tensor: tensor.to(device), (x, y))
    return x, y


def _require_values(x: Any, y: Tensor) -> None:
    """Raise an InputError if a tensor of a batch has no values, which no device can be given."""
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((x, y))):
        raise InputError(
            "the loader yielded a tensor on the device 'meta', which has no values. "
            "Hint: let the loader yield data"
        )


def random_batch(
    inputs: Sequence[Input], batch: int, *, in_unit_range: bool = False
) -> tuple[Tensor, ...]:
    """Return a random batch of every input, on the CPU; the caller's random state does not move.

    Args:
        inputs: of the model, as `BlockPlan.inputs` has them.
        batch: the number of samples. The same number gives the same values.
        in_unit_range: whether floats lie between 0 and 1, where logarithms and roots have values;
            else they are normal.
    """
    generator = torch.Generator().manual_seed(batch)
    drawn = tuple(_random(each, batch, generator) for each in inputs)
    if in_unit_range:
        drawn = tuple(each.sigmoid() if each.is_floating_point() else each for each in drawn)
    return drawn


def constant_batch(
    inputs: Sequence[Input], batch: int, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Return a batch of ones of every input.

    Ones are valid as numbers, and as token indices, lengths and masks as well. Inside a
    `FakeTensorMode` the tensors are fake.

    Args:
        inputs: of the model.
        batch: the number of samples.
        device: of the tensors.
    """
    tensors = []
    for each in inputs:
        ones = torch.ones((batch, *each.shape), device=device)
        tensors.append(ones.to(getattr(torch, each.dtype)))
    return tuple(tensors)


def like_the_model(net: nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors on the device of a model. Floats get the dtype of its parameters."""
    like = next(p for p in net.parameters() if p.is_floating_point())
    moved = []
    for tensor in tensors:
        dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
        moved.append(tensor.to(like.device, dtype))
    return tuple(moved)


@contextmanager
def explaining_input_errors(
    net: nn.Module, values: Mapping[str, Any], place: str = _MODEL
) -> Iterator[None]:
    """Explain an error of torch inside the model by an input that the model was not cut for.

    Args:
        net: what `transform` returned.
        values: its inputs by name.
        place: the part of the model that runs.

    Raises:
        InputError: instead of torch's error, where an input differs from the example. Errors with
            another cause, such as too little memory, stay as they are.
    """
    with explaining_errors(plan_of(net).inputs, net.parameters, values, place):
        yield


@contextmanager
def explaining_errors(
    inputs: Sequence[Input],
    parameters: Callable[[], Iterable[Tensor]],
    values: Mapping[str, Any],
    place: str = _MODEL,
) -> Iterator[None]:
    """Explain an error of torch as `explaining_input_errors` does.

    Args:
        inputs: of the model.
        parameters: returns the parameters of the model.
        values: its inputs by name.
        place: the part of the model that runs.
    """
    try:
        yield
    # A layer that looks at an axis that is not there raises an IndexError, and so on.
    except Exception as error:
        if isinstance(error, SffxError):
            raise
        known = list(parameters())
        # First, since torch's words for another device are among the unrelated messages.
        _require_device(known, values)
        if isinstance(error, _UNRELATED_ERRORS) or _UNRELATED_MESSAGES.search(str(error)):
            raise
        differences = _differences(inputs, known, values)
        if isinstance(error, IndexError):
            differences += _too_large(inputs, values)
        if not differences:
            raise
        raise InputError(
            f"{'; '.join(differences)}. In {place}, torch says: {str(error).rstrip('.')}. "
            "Hint: if that is why, pass inputs like those, or cut the model for these, "
            "sffx.transform(model, example_input=x)"
        ) from error


def _all_tensors(values: Sequence[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _random(each: Input, batch: int, generator: torch.Generator) -> Tensor:
    """Return a random batch of one input, whose values the model takes."""
    shape = (batch, *each.shape)
    dtype = getattr(torch, each.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    if each.marks_tokens:
        # Each sample has at least one real token, and its padding lies behind the real ones.
        length = shape[1]
        real = torch.randint(1, length + 1, (batch, 1), generator=generator, device="cpu")
        return (torch.arange(length) < real).to(dtype)
    # Integers that no embedding bounds are 0.
    high = 2 if dtype == torch.bool else max(each.high, 1)
    drawn = torch.randint(each.low, high, shape, generator=generator, device="cpu")
    return drawn.to(dtype)


def _require_device(parameters: Sequence[Tensor], values: Mapping[str, Any]) -> None:
    """Raise an InputError if an input is on a device where no parameter is, or not every one."""
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if any(each.is_meta for each in parameters) and not any(each.is_meta for each in tensors):
        raise InputError(
            f"the net has parameters on the meta device, where they have no values. "
            f"{WITHOUT_VALUES}"
        )
    # The blocks of an offloaded model are on two devices.
    devices = list(dict.fromkeys(str(parameter.device) for parameter in parameters))
    for name, value in values.items():
        if devices and isinstance(value, Tensor) and str(value.device) not in devices:
            raise InputError(
                f"{name} is on {value.device}, but the model is on {' and '.join(devices)}. "
                f"Hint: {name}.to({devices[0]!r})"
            )


def _differences(
    inputs: Sequence[Input], parameters: Sequence[Tensor], values: Mapping[str, Any]
) -> list[str]:
    """Return a sentence for each input that differs from the one that the model was cut for."""
    differences = []
    for traced in inputs:
        value = values.get(traced.name)
        if not isinstance(value, Tensor):
            continue
        dtype = _present_dtype(parameters, traced)
        if tuple(value.shape[1:]) == traced.shape and value.dtype == dtype:
            continue
        differences.append(
            f"{traced.name} is {tuple(value.shape)} of {_dtype_name(value.dtype)}, "
            f"but the model was cut for {traced.shape_in_words} of {_dtype_name(dtype)}"
        )
    return differences


def _too_large(inputs: Sequence[Input], values: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each input of whole numbers that no embedding has rows for."""
    sentences = []
    for traced in inputs:
        value = values.get(traced.name)
        if not traced.high or not isinstance(value, Tensor) or value.is_floating_point():
            continue
        # A device that found such an index can compute no more.
        if value.device.type != "cpu" or not value.numel():
            continue
        low = int(value.min())
        high = int(value.max())
        if low < 0 or high >= traced.high:
            sentences.append(
                f"{traced.name} holds {low} to {high}, but the model takes 0 to {traced.high - 1}"
            )
    return sentences


def _present_dtype(parameters: Sequence[Tensor], value: Input) -> torch.dtype:
    """Return the dtype that an input must have now.

    The precision of the model may have changed since the cut, as by `net.half()`.
    """
    traced: torch.dtype = getattr(torch, value.dtype)
    if not traced.is_floating_point:
        return traced
    floats = [p.dtype for p in parameters if p.is_floating_point()]
    return floats[0] if floats else traced


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
