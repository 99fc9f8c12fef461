"""Self-attention of `torch.nn.MultiheadAttention` without its copies, and with the norm before it computed again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.activation import gradients_are_private
from sffx.kernels.recompute import Chain, Recomputed, can_recompute


def self_attention(x: Tensor, attention: Any, *, norm: Any = None) -> Tensor:
    """Return `attention(y, y, y, need_weights=False)[0]` for y = `norm(x)`, keeping x, but not y, for the backward pass.

    Args:
        x: tokens, (B, T, C).
        attention: with `batch_first`, one embedding size, and no keys or values of its own.
        norm: a layer norm.
    """
    if x.ndim != 3 or not can_recompute(
        x, [module for module in (norm, attention) if module is not None]
    ):
        y = norm(x) if norm is not None else x
        return attention(y, y, y, need_weights=False)[0]
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    chain = Chain(norm, frees_gradient=gradients_are_private())
    stacked = Recomputed.apply(
        x, weight, bias, attention.in_proj_weight, attention.in_proj_bias, chain
    )
    query, key, value = (
        stacked.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    )
    mixed = F.scaled_dot_product_attention(
        query, key, value, dropout_p=attention.dropout if attention.training else 0.0
    )
    return F.linear(
        mixed.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias
    )  # as torch does, without a call
