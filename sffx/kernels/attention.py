"""Self-attention of `torch.nn.MultiheadAttention` without its copies.

The norm before it is computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.activation import gradients_are_private
from sffx.kernels.recompute import Chain, Recomputed, can_recompute


def self_attention(x: Tensor, attention: Any, *, norm: Any = None) -> Tensor:
    """Return `attention(y, y, y, need_weights=False)[0]` for y = `norm(x)`.

    It keeps x for the backward pass, but not y.

    Args:
        x: tokens, (B, T, C).
        attention: a `torch.nn.MultiheadAttention` with `batch_first`, one embedding size, and no
            keys or values of its own.
        norm: a layer norm; None for none.
    """
    modules = [attention] if norm is None else [norm, attention]
    if x.ndim != 3 or not can_recompute(x, modules):
        y = norm(x) if norm is not None else x
        return attention(y, y, y, need_weights=False)[0]
    mixed = _mixed_values(_projected(x, attention, norm), attention)
    # The module's weights are used without a call of it, as torch does.
    y = F.linear(
        mixed.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias
    )
    # Torch lays its result out with the tokens first. A dropout behind it draws in the order of
    # memory, so another layout would drop other values. Nothing keeps y, so the copy is brief.
    return y.transpose(0, 1).contiguous().transpose(0, 1)


def _projected(x: Tensor, attention: Any, norm: Any) -> Tensor:
    """Return queries, keys and values of each token side by side, (B, T, 3 C)."""
    norm_weight = None if norm is None else norm.weight
    norm_bias = None if norm is None else norm.bias
    chain = Chain(norm, frees_gradient=gradients_are_private())
    return Recomputed.apply(
        x, norm_weight, norm_bias, attention.in_proj_weight, attention.in_proj_bias, chain
    )


def _mixed_values(projected: Tensor, attention: Any) -> Tensor:
    """Return the values that each head mixes for each token, (B, heads, T, C / heads)."""
    by_head = projected.unflatten(2, (3, attention.num_heads, -1))
    query, key, value = by_head.permute(2, 0, 3, 1, 4).unbind()
    dropout = attention.dropout if attention.training else 0.0
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
