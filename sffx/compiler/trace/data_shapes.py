"""Operations whose shapes depend on data, in the forward of the model itself.

Classifiers with an encoder and a decoder read the state at the last end-of-sentence token,
`hidden[eos_mask, :]`, behind checks that each sample has as many. A graph holds these operations,
and guards of the checks. Fake tensors have no data, so there a mask selects everything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from sffx.compiler.facts import facts
from sffx.compiler.fake import ones_like
from sffx.compiler.walks import nodes_behind
from sffx.errors import InputError


def select_true(x: Tensor, index: Any) -> Tensor:
    """Return `x[index]`, where the index has a mask."""
    selected: Tensor = _run(operator.getitem, x, index)
    return selected


def find_runs(*args: Any, **kwargs: Any) -> Any:
    """Return `torch.unique_consecutive(...)`."""
    return _run(torch.unique_consecutive, *args, **kwargs)


@fx.node.has_side_effect
def require_data(value: Any, outcome: bool, place: str) -> None:
    """Raise an InputError if a forward would take another branch on its data.

    Args:
        value: the truth value that it branches on.
        outcome: that a graph holds.
        place: qualname of the module that branches, "" for the model itself.
    """
    if is_recorded(require_data, value, outcome, place):
        return
    if bool(value) != outcome:
        raise InputError(
            f"{where_in_model(place)} checks its input, and this one does not pass. Hint: call the "
            "model itself on it, and read its error; samples may need the same number of "
            "end-of-sentence tokens"
        )


def is_recorded(guard: Callable[..., None], value: Any, *more: Any) -> bool:
    """Record the call of a guard if its value is a proxy: a user's own tracer may trace a net.

    Returns:
        Whether it was recorded, so that there is nothing to check.
    """
    if not isinstance(value, fx.Proxy):
        return False
    value.tracer.create_proxy("call_function", guard, (value, *more), {})
    return True


def where_in_model(place: str) -> str:
    """Return how a message names the module with a qualname, "" for the model itself."""
    return f"the module {place!r}" if place else "the model"


def data_shaped_target(target: Any, args: tuple[Any, ...]) -> Any:
    """Return what a graph calls in the place of a function whose shapes depend on data."""
    if target is torch.unique_consecutive:
        return find_runs
    if target is operator.getitem and _has_one_mask(args[1]):
        return select_true
    return target


def _has_one_mask(index: Any) -> bool:
    """Whether an index is a mask, or a mask among slices."""
    parts = index if type(index) is tuple else (index,)
    others = [part for part in parts if not _is_traced_mask(part)]
    return len(others) == len(parts) - 1 and all(isinstance(part, slice) for part in others)


def _is_traced_mask(value: Any) -> bool:
    return isinstance(value, fx.Proxy) and _is_mask(facts(value.node).example)


def is_data_shaped(node: fx.Node) -> bool:
    """Whether the shape of a node's value depends on data."""
    return node.target in (select_true, find_runs)


def depends_on_data(node: fx.Node) -> bool:
    """Whether a node comes after one whose shape depends on data."""
    return any(is_data_shaped(each) for each in nodes_behind(node))


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    fakes = [each for each in tree_leaves((args, kwargs)) if isinstance(each, FakeTensor)]
    if not fakes:
        return function(*args, **kwargs)
    if function is operator.getitem:
        return _select_everything(*args)
    with unset_fake_temporarily(), torch.no_grad():
        ones, keywords = tree_map_only(Tensor, ones_like, (args, kwargs))
        result = function(*ones, **keywords)
    mode = fakes[0].fake_mode
    return tree_map_only(Tensor, mode.from_tensor, result)


def _select_everything(x: Tensor, index: Any) -> Tensor:
    """Return `x[index]` as if its masks were true everywhere, by operations without data."""
    parts = index if isinstance(index, tuple) else (index,)
    rest: list[Any] = []
    for axis, part in enumerate(parts):
        if _is_mask(part):
            x = x.flatten(axis, axis + part.ndim - 1)
            rest.append(slice(None))
        else:
            rest.append(part)
    return x[tuple(rest)]
