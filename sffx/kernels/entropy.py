"""Cross-entropy over positions with little memory, and over blocks with few operations.

torch's own keeps the logarithm of the softmax, as large as the scores, and makes two more tensors
of that size in its backward pass. With a vocabulary of 32,000 these are most of a step's memory.
`summed_cross_entropy` keeps the scores and one number for each position, and makes the gradient
alone. Inside `private_scores()` it writes the gradient over the scores, and makes nothing of that
size.

The blocks of a local step have the same labels. `SharedCrossEntropy` computes once what depends on
the labels alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.kernels.batch_slices import small_slices
from sffx.kernels.once import HandWritten, first_derivatives_only
from sffx.kernels.scoped import scoped

_aten = torch.ops.aten

# torch's code for the mean over the samples, and the label that it leaves out by default.
_MEAN = 1
_LEFT_OUT = -100

# From so many classes on, the memory counts for more than the time of single operations.
MANY_CLASSES = 1024

_PRIVATE: ContextVar[bool] = ContextVar("private_scores", default=False)

# Functions of autograd that do not read their output again, so it may be written over.
_KEEP_NO_OUTPUT = ("AddmmBackward0", "MmBackward0", "_SquaredLinearBackward", "ToCopyBackward0")
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


@contextmanager
def private_scores(private: bool = True) -> Iterator[None]:
    """Promise that nobody reads the scores of a loss computed inside once it has run backward.

    Args:
        private: False takes back an outer promise.
    """
    with scoped(_PRIVATE, private):
        yield


def _may_be_written_over(scores: Tensor) -> bool:
    """Return whether nobody reads scores again, not even the layer that made them."""
    function = scores.grad_fn
    while function is not None and function.name() in _VIEWS:
        function = function.next_functions[0][0]
    return _PRIVATE.get() and function is not None and function.name() in _KEEP_NO_OUTPUT


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
    return _SummedCrossEntropy.apply(rows, labels, ignore_index, _may_be_written_over(scores))


class _SummedCrossEntropy(HandWritten):
    """The sum over rows of `log sum_j exp s[n, j] - s[n, y_n]`, part by part of the rows."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, y: Tensor, ignore_index: int, overwrite: bool) -> Tensor:
        ctx.overwrite = overwrite
        is_counted = y != ignore_index
        labels = y.masked_fill(~is_counted, 0)
        normaliser = scores.new_empty(len(scores))
        for part in small_slices(scores, scores.shape[1]):
            normaliser[part] = torch.logsumexp(scores[part], dim=1)
        chosen = scores.gather(1, labels[:, None])[:, 0]
        ctx.save_for_backward(scores, labels, is_counted, normaliser)
        return (normaliser - chosen).masked_fill(~is_counted, 0).sum()

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scores, labels, is_counted, normaliser = ctx.saved_tensors
        gradient = scores.detach() if ctx.overwrite else torch.empty_like(scores)
        shares = is_counted.to(scores.dtype) * scale
        for part in small_slices(scores, scores.shape[1]):
            rows = gradient[part]
            torch.sub(scores[part], normaliser[part, None], out=rows)
            rows.exp_().mul_(shares[part, None])
        # At the label one less.
        gradient.scatter_add_(1, labels[:, None], -shares[:, None])
        return gradient, None, None, None


class SharedCrossEntropy:
    """The mean cross-entropy of several scores with the same labels, and its gradients.

    Values and gradients are those of `F.cross_entropy` to the bit. It dispatches three operations
    for each scores, where autograd dispatches five.

    Args:
        y: class indices, (B,).
    """

    def __init__(self, y: Tensor) -> None:
        self._y = y
        self._directions: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and its gradient by the scores, (B, J).

        Args:
            scores: (B, J), in float32 or wider.
        """
        log_shares = F.log_softmax(scores, dim=1)
        loss, weight = _aten.nll_loss_forward(log_shares, self._y, None, _MEAN, _LEFT_OUT)
        direction = self._direction(log_shares, weight)
        gradient = _aten._log_softmax_backward_data(direction, log_shares, 1, log_shares.dtype)
        return loss, gradient

    def _direction(self, log_shares: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient by the logarithm of the shares: -1 / B at each label."""
        key = (log_shares.shape, log_shares.dtype)
        if key not in self._directions:
            one = log_shares.new_ones(())
            self._directions[key] = _aten.nll_loss_backward(
                one, log_shares, self._y, None, _MEAN, _LEFT_OUT, weight
            )
        return self._directions[key]
