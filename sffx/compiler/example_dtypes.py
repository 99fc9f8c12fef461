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

from sffx.tensors import tensors_in

# The first tensor of these operations is a summand, such as the bias of a linear layer. The input
# is the second one.
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
        is_elementwise = torch.Tag.pointwise in func.tags
        # Elementwise operations convert their tensors to one dtype, so torch takes any.
        if not is_elementwise:
            dtypes = [tensor.dtype for tensor in tensors_in((args, kwargs))]
            name = func._schema.name.partition("::")[2]  # of "aten::addmm"
            if _may_be_refused(name, dtypes):
                self.is_suspicious = True
        return func(*args, **kwargs)


def _may_be_refused(name: str, dtypes: list[torch.dtype]) -> bool:
    """Return whether torch may refuse an operation.

    Args:
        name: of the operation, without its namespace.
        dtypes: of its tensors, in order.
    """
    float_dtypes = {dtype for dtype in dtypes if _is_float(dtype)}
    if len(float_dtypes) > 1:
        return True
    if not float_dtypes or len(set(dtypes)) == 1:
        return False
    # Floats and integers meet. Integers behind a tensor of floats may be indices into it, as in an
    # embedding. Before it they are an input of the wrong dtype, as in `integers @ weight`. Where a
    # summand comes first, the input is behind it.
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
    """Yield casts of inputs to dtypes that the model may take, the likeliest first.

    Args:
        model: its parameters have the dtype that float inputs should have.
        values: the inputs by name.

    Yields:
        Each cast as text, such as "x.to(torch.float32)", and all inputs after it.
    """
    own = own_dtype(model)
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    floats = [name for name, value in tensors.items() if _is_float(value.dtype)]
    others = [name for name in tensors if name not in floats]
    changes = [(floats, own), (others, own), (list(tensors), own)]
    changes += [([name], own) for name in others]
    # The model may read floats as indices, which an embedding wants as integers.
    changes += [([name], torch.int64) for name in tensors]
    for names, dtype in changes:
        changed = [name for name in names if tensors[name].dtype != dtype]
        if not changed:
            continue
        text = ", ".join(f"{name}.to({dtype})" for name in changed)
        cast = {name: tensors[name].to(dtype) for name in changed}
        yield text, {**values, **cast}
