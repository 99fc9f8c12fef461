"""Inputs of a dtype that the layers do not take.

Most operations on fake tensors do not look at dtypes: a matrix product of integers and floats
passes, which torch refuses on real values. So a run on fakes is watched for operations whose
tensors differ in dtype. If there is one, the model runs on the caller's own values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The first tensor of these is a summand, as the bias of a linear layer, and not the input.
_ADDING = ("addmm", "addmv", "addbmm", "baddbmm")


class DtypeWatch(TorchDispatchMode):
    """Watches for operations that torch may refuse for the dtypes of their tensors.

    Attributes:
        is_suspicious: whether there was such an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_suspicious = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Elementwise operations convert their tensors to one dtype.
        if torch.Tag.pointwise not in func.tags:
            leaves = tree_leaves((args, kwargs))
            dtypes = [each.dtype for each in leaves if isinstance(each, Tensor)]
            name = func._schema.name.partition("::")[2]
            self.is_suspicious = self.is_suspicious or _may_be_refused(name, dtypes)
        return func(*args, **kwargs)


def _may_be_refused(name: str, dtypes: list[torch.dtype]) -> bool:
    """Return whether torch may refuse an operation.

    Args:
        name: of the operation, without its namespace.
        dtypes: of its tensors, in order.
    """
    floats = {dtype for dtype in dtypes if _is_float(dtype)}
    if len(floats) > 1:
        return True
    if not floats or len(set(dtypes)) == 1:
        return False
    # A tensor of floats may come first and be picked from by integers, as in an embedding.
    return name in _ADDING or not _is_float(dtypes[0])


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def have_own_dtype(model: nn.Module, values: Mapping[str, Any]) -> bool:
    """Return whether all inputs have the dtype of the parameters."""
    own = own_dtype(model)
    return all(value.dtype == own for value in values.values() if isinstance(value, Tensor))


def own_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter of floats, torch.float32 where there is none."""
    dtypes = [each.dtype for each in model.parameters() if each.is_floating_point()]
    return dtypes[0] if dtypes else torch.float32


def other_dtypes(
    model: nn.Module, values: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield casts of inputs to dtypes that the model may take: as text, and the inputs after it.

    Args:
        model: its parameters have the dtype that float inputs should have.
        values: the inputs by name.
    """
    own = own_dtype(model)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    floats = [name for name, value in tensors.items() if _is_float(value.dtype)]
    others = [name for name in tensors if name not in floats]
    changes = [(floats, own), (others, own), (list(tensors), own)]
    changes += [([name], own) for name in others]
    # Indices, as of an embedding.
    changes += [([name], torch.int64) for name in tensors]
    for names, dtype in changes:
        changed = [name for name in names if tensors[name].dtype != dtype]
        if changed:
            text = ", ".join(f"{name}.to({dtype})" for name in changed)
            yield text, {**values, **{name: tensors[name].to(dtype) for name in changed}}
