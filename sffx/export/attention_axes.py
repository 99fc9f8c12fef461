"""Attention over tensors that have no axis of heads, for the ONNX exporter.

The exporter takes queries, keys and values of four axes only, (B, heads, T, C). torch takes any
number of axes in front of the last two.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Those of (B, heads, T, C).
_AXES = 4


class FourAxes(TorchFunctionMode):
    """Lets attention run on tensors of four axes, and gives its result the axes that it had."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _on_four_axes(*args, **kwargs)
        return func(*args, **kwargs)


def _on_four_axes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Tensor:
    """Return the attention of tensors with any number of axes.

    The arguments are those of `torch.nn.functional.scaled_dot_product_attention`.
    """
    if query.ndim == _AXES:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **more)
    front = query.shape[:-2]
    if attn_mask is not None:
        attn_mask = _with_four_axes(attn_mask.expand(*front, *attn_mask.shape[-2:]))
    query, key, value = map(_with_four_axes, (query, key, value))
    result = F.scaled_dot_product_attention(query, key, value, attn_mask, *rest, **more)
    return result.reshape(*front, *result.shape[-2:])


def _with_four_axes(x: Tensor) -> Tensor:
    if x.ndim == 2:
        return x[None, None]
    return x[:, None] if x.ndim == 3 else x.flatten(0, x.ndim - _AXES)
