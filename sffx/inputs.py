"""The inputs of a cut model, and how they differ from those that it was cut for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from sffx.errors import InputError, SffxError
from sffx.net import plan_of

OTHER_ERRORS = (SffxError, NotImplementedError, torch.OutOfMemoryError, torch.AcceleratorError)
OTHER_MESSAGES = re.compile("allocate memory|same device|device type|out of memory")


def arguments_of(net: fx.GraphModule, x: Any) -> Iterator[tuple[fx.Node, Any]]:
    """Pair the placeholders of the outer graph with their values.

    Raises:
        InputError: there are more or fewer values, or other names.
    """
    placeholders = [node for node in net.graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    if isinstance(x, Mapping):
        if set(x) != set(names):
            raise InputError(
                f"x has the keys {', '.join(map(repr, x))}, but the model takes {', '.join(map(repr, names))}"
            )
        return ((node, x[name]) for node, name in zip(placeholders, names, strict=True))
    values = x if isinstance(x, tuple) else (x,)
    if len(values) != len(names):
        raise InputError(
            f"x holds {len(values)} inputs, but the model takes {len(names)}: {', '.join(names)}"
        )
    return zip(placeholders, values, strict=True)


@contextmanager
def told_of_inputs(net: fx.GraphModule, x: Any) -> Iterator[None]:
    """Where torch fails in the model, say which input is not like the one that the model was cut for, if one is not.

    Args:
        net: what `transform` returned.
        x: the input; a tuple of positional or a mapping of keyword arguments where the model has several.

    Raises:
        InputError: instead of torch's error. Errors of memory and devices, which have other causes, stay as they are.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        unlike = (
            ""
            if isinstance(error, OTHER_ERRORS) or OTHER_MESSAGES.search(str(error))
            else _unlike(net, x)
        )
        if not unlike:
            raise
        hint = "Hint: if that is why, pass inputs like those, or cut the model for these, sffx.transform(model, example_input=x)"
        raise InputError(
            f"{unlike}. In the model, torch says: {str(error).rstrip('.')}. {hint}"
        ) from error


def _unlike(net: fx.GraphModule, x: Any) -> str:
    """Return a sentence about the inputs that are not what the model was cut for, "" if all are."""
    plan = plan_of(net)
    names = [known.name for known in plan.inputs]
    by_name = (
        x
        if isinstance(x, Mapping)
        else dict(zip(names, x if isinstance(x, tuple) else (x,), strict=False))
    )
    floats = [p.dtype for p in net.parameters() if p.is_floating_point()]
    found = []
    for known in plan.inputs:
        value = by_name.get(known.name)
        if not isinstance(value, Tensor):
            continue
        # The model may have another precision by now than when it was cut.
        wanted = (
            floats[0]
            if floats and getattr(torch, known.dtype).is_floating_point
            else getattr(torch, known.dtype)
        )
        if (tuple(value.shape[1:]), value.dtype) != (known.shape, wanted):
            shape = ", ".join(["B", *map(str, known.shape)])
            is_, was = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, wanted))
            found.append(
                f"{known.name} is {tuple(value.shape)} of {is_}, but the model was cut for ({shape}) of {was}"
            )
    return "; ".join(found)
