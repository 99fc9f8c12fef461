"""The SFF loss: the sum over the blocks of cross-entropy with a block's goodness as logits (section 4.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError

LossFunction = Callable[[Tensor, Tensor], Tensor]


def sff_loss(goodness: Tensor, y: Tensor, loss_fn: LossFunction | None = None) -> Tensor:
    """Return the loss of all blocks, a scalar: the sum over blocks of `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )`.

    The sum keeps a block's gradient independent of how many blocks there are.

    Args:
        goodness: what the cut model returns in train mode, (K, B, J).
        y: class indices, (B,), or probabilities of the classes, (B, J), as mixup makes them; or what `loss_fn` takes.
        loss_fn: a block's loss, a scalar, from its goodness, (B, J), and y, such as `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`;
            cross-entropy, the method's own, if None.

    Raises:
        InputError: the shapes do not fit, a label is out of range, or `loss_fn` returns no scalar.
    """
    if goodness.ndim != 3:
        raise InputError(
            f"goodness has shape {tuple(goodness.shape)}, not (K, B, J). Hint: in eval mode the model returns scores; call net.train()"
        )
    check_targets(y, goodness.shape[1], goodness.shape[2], loss_fn)
    return total([block_loss(g, y, loss_fn) for g in goodness])


def block_loss(goodness: Tensor, y: Tensor, loss_fn: LossFunction | None = None) -> Tensor:
    """Return the loss of one block, a scalar, from its goodness or logits (B, J) and targets, as `sff_loss` takes them.

    Raises:
        InputError: `loss_fn` returns no scalar.
    """
    logits = goodness if goodness.dtype.itemsize > 2 else goodness.float()
    if loss_fn is None:
        return F.cross_entropy(logits, y.to(logits.dtype) if y.is_floating_point() else y)
    loss = loss_fn(logits, y)
    if loss.ndim:
        raise InputError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar. Hint: the mean over the samples"
        )
    return loss


def total(losses: list[Tensor]) -> Tensor:
    """Add up the losses of the blocks; one function, so that every way to train gives the same value to the bit."""
    return torch.stack(losses).sum()


def check_targets(
    y: Tensor, batch: int, num_classes: int, loss_fn: LossFunction | None = None
) -> None:
    """Check that targets of a loss fit: class indices or probabilities of the classes; a loss function of one's own may take others.

    Raises:
        InputError: they do not; says what they are and what they should be.
    """
    soft = (
        isinstance(y, Tensor) and y.is_floating_point() and tuple(y.shape) == (batch, num_classes)
    )
    if loss_fn is None and not soft:
        check_labels(y, batch, num_classes)


def check_labels(y: Tensor, batch: int, num_classes: int) -> None:
    """Check that labels are class indices that fit.

    Raises:
        InputError: they do not; says what they are and what they should be.
    """
    if not isinstance(y, Tensor):
        raise InputError(
            f"y is a {type(y).__name__}, not a tensor. Hint: pass class indices, torch.tensor(y)"
        )
    if y.ndim != 1 or len(y) != batch:
        raise InputError(
            f"y has shape {tuple(y.shape)}, not ({batch},). Hint: class indices, one for each sample, or for a loss probabilities, "
            f"({batch}, {num_classes})"
        )
    if y.is_floating_point() or y.dtype.itemsize < 8:
        raise InputError(
            f"y has dtype {y.dtype}, not torch.int64. Hint: pass class indices, y.long()"
        )
    # On a GPU the check would wait for the device (there, cross-entropy itself stops at a label out of range); fake tensors have no values.
    if (
        type(y) is Tensor
        and y.device.type == "cpu"
        and batch
        and (y.min() < 0 or y.max() >= num_classes)
    ):
        ignored = (
            ". Hint: loss_fn=torch.nn.CrossEntropyLoss() leaves out labels of -100"
            if y.min() == -100
            else ""
        )
        found = f"labels run from {int(y.min())} to {int(y.max())}"
        raise InputError(
            f"{found}, but there are {num_classes} classes, 0 to {num_classes - 1}{ignored}"
        )
