"""The list that `lengths.tolist()` gives, of which a trace knows no number.

Functions that pack sequences make a tensor of it again, which is recorded. Any other use would need
the numbers, and is refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx

READS_A_NUMBER = "a number is read from a tensor, which depends on the data"


class Listed:
    """Stands for the list of the integers in a tensor of one axis.

    Attributes:
        tensor: the proxy of the tensor.
    """

    def __init__(self, tensor: fx.Proxy) -> None:
        vars(self)["tensor"] = tensor

    # The model may ask what it is.
    __class__ = property(lambda self: list)

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(READS_A_NUMBER)

    def __fx_create_arg__(self, tracer: fx.Tracer) -> NoReturn:
        raise RuntimeError(READS_A_NUMBER)


def _refuse(self: Listed, *args: Any) -> NoReturn:
    raise RuntimeError(READS_A_NUMBER)


for _name in (
    *("len", "iter", "getitem", "setitem", "contains", "bool", "reversed", "str", "repr", "format"),
    *("add", "radd", "iadd", "mul", "rmul", "imul", "eq", "ne", "lt", "le", "gt", "ge", "hash"),
):
    setattr(Listed, f"__{_name}__", _refuse)


def is_listed(value: Any) -> bool:
    """Return whether a value stands for the list of a tensor."""
    return type(value) is Listed


def tensor_of(listed: Any, dtype: Any = None, device: Any = None) -> Any:
    """Return the proxy of the tensor that `torch.tensor` makes of a list."""
    tensor = vars(listed)["tensor"]
    # A new tensor, as of a list, so that a write on it leaves the other one as it is.
    device = torch.get_default_device() if device is None else device
    return tensor.to(device=device, dtype=dtype or torch.int64, copy=True)
