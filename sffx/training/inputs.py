"""How the inputs of a cut model differ from those that it was cut for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sffx.compiler.plan import BlockPlan
from sffx.errors import InputError


@contextmanager
def told_of_inputs(plan: BlockPlan, x: Any) -> Iterator[None]:
    """Where torch fails in the model, say which input is not like the one that the model was cut for, if one is not.

    Args:
        plan: of the model.
        x: the input; a tuple of positional or a mapping of keyword arguments where the model has several.

    Raises:
        InputError: instead of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        unlike = _unlike(plan, x)
        if not unlike:
            raise
        hint = "Hint: pass inputs like those, or cut the model for these, sffx.transform(model, example_input=x)"
        raise InputError(f"{unlike}. In the model, torch says: {str(error).rstrip('.')}. {hint}") from error


def _unlike(plan: BlockPlan, x: Any) -> str:
    """Return a sentence about the inputs that have another shape or dtype than when the model was cut, "" if none has."""
    names = [known.name for known in plan.inputs]
    by_name = x if isinstance(x, Mapping) else dict(zip(names, x if isinstance(x, tuple) else (x,), strict=False))
    found = []
    for known in plan.inputs:
        value = by_name.get(known.name)
        if not isinstance(value, Tensor):
            continue
        dtype = str(value.dtype).removeprefix("torch.")
        if (tuple(value.shape[1:]), dtype) != (known.shape, known.dtype):
            wanted = ", ".join(["B", *map(str, known.shape)])
            found.append(f"{known.name} is {tuple(value.shape)} of {dtype}, but the model was cut for ({wanted}) of {known.dtype}")
    return "; ".join(found)
