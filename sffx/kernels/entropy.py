"""Cross-entropy over positions, with little memory where there are many classes.

torch's own keeps the logarithm of the softmax, as large as the scores, and makes two more tensors
of that size in its backward pass. With a vocabulary of 32,000 these are most of a step's memory.
The function here keeps the scores and one number for each position, and makes the gradient alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sffx.kernels.batch_slices import small_slices

# From so many classes on, the memory counts for more than the time of single operations.
MANY_CLASSES = 1024


def summed_cross_entropy(scores: Tensor, y: Tensor, ignore_index: int, class_axis: int) -> Tensor:
    """Return the sum of cross-entropy over the positions that are not left out, a scalar.

    Args:
        scores: (B, J, ...) or (B, T, J), in float32 or wider.
        y: class indices, of the shape of the scores without the classes.
        ignore_index: the label of positions that are left out.
        class_axis: of the scores.
    """
    is_by_rows = class_axis == scores.ndim - 1
    if not is_by_rows:
        return F.cross_entropy(scores, y, ignore_index=ignore_index, reduction="sum")
    rows = scores.reshape(-1, scores.shape[-1])
    labels = y.reshape(-1)
    # A graph that is made, by torch.compile or an exporter, cannot hold the function.
    if scores.shape[-1] < MANY_CLASSES or torch.compiler.is_compiling():
        return F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction="sum")
    return _SummedCrossEntropy.apply(rows, labels, ignore_index)


class _SummedCrossEntropy(Function):
    """The sum over rows of `log sum_j exp s[n, j] - s[n, y_n]`, part by part of the rows."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, y: Tensor, ignore_index: int) -> Tensor:
        is_counted = y != ignore_index
        labels = y.masked_fill(~is_counted, 0)
        normaliser = scores.new_empty(len(scores))
        for part in small_slices(scores, scores.shape[1]):
            normaliser[part] = torch.logsumexp(scores[part], dim=1)
        chosen = scores.gather(1, labels[:, None])[:, 0]
        ctx.save_for_backward(scores, labels, is_counted, normaliser)
        return (normaliser - chosen).masked_fill(~is_counted, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scores, labels, is_counted, normaliser = ctx.saved_tensors
        gradient = torch.empty_like(scores)
        shares = is_counted.to(scores.dtype) * scale
        for part in small_slices(scores, scores.shape[1]):
            rows = gradient[part]
            torch.sub(scores[part], normaliser[part, None], out=rows)
            rows.exp_().mul_(shares[part, None])
        # At the label one less.
        gradient.scatter_add_(1, labels[:, None], -shares[:, None])
        return gradient, None, None
