"""The SFF loss: the sum over the blocks of cross-entropy, with goodness as logits (section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.kernels.precision import widened

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def sff_loss(goodness: Tensor, y: Tensor, loss_fn: LossFunction | None = None) -> Tensor:
    """Return the loss of all blocks, a scalar.

    It is the sum over blocks of `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )`. Since it is a sum,
    the gradient of a block does not depend on the number of blocks.

    Args:
        goodness: what the cut model returns in train mode, (K, B, J).
        y: class indices, (B,), or probabilities of the classes, (B, J), as mixup makes them; or
            what `loss_fn` takes.
        loss_fn: returns the loss of one block, a scalar, given its goodness, (B, J), and y. An
            example is `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`. None stands for
            cross-entropy, the method's own.

    Raises:
        InputError: the shapes do not fit, a label is out of range, or `loss_fn` returns no scalar.
    """
    if goodness.ndim != 3:
        raise InputError(
            f"goodness has shape {tuple(goodness.shape)}, not (K, B, J). "
            "Hint: in eval mode the model returns scores; call net.train()"
        )
    check_targets(y, goodness.shape[1], goodness.shape[2], loss_fn)
    return total([block_loss(g, y, loss_fn) for g in goodness])


def block_loss(goodness: Tensor, y: Tensor, loss_fn: LossFunction | None = None) -> Tensor:
    """Return the loss of one block, a scalar.

    Args:
        goodness: of the block, or the classifier's logits, (B, J).
        y: targets, as `sff_loss` takes them.
        loss_fn: as `sff_loss` takes it.

    Raises:
        InputError: `loss_fn` returns no scalar.
    """
    logits = widened(goodness)
    if loss_fn is None:
        targets = y.to(logits.dtype) if y.is_floating_point() else y
        return F.cross_entropy(logits, targets)
    loss = loss_fn(logits, y)
    if loss.ndim:
        raise InputError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar. "
            "Hint: the mean over the samples"
        )
    return loss


def total(losses: list[Tensor]) -> Tensor:
    """Return the sum of the blocks' losses.

    Every way to train calls this one function, so that all give the same value to the bit.
    """
    return torch.stack(losses).sum()


def check_targets(
    y: Tensor, batch: int, num_classes: int, loss_fn: LossFunction | None = None
) -> None:
    """Raise an InputError if y is neither class indices nor probabilities of the classes.

    A loss function of one's own may take other targets, which are not checked.
    """
    if loss_fn is not None:
        return
    is_tensor_of_floats = isinstance(y, Tensor) and y.is_floating_point()
    if is_tensor_of_floats and tuple(y.shape) == (batch, num_classes):
        return
    check_labels(y, batch, num_classes)


def check_labels(y: Tensor, batch: int, num_classes: int) -> None:
    """Raise an InputError if y is not a class index for each sample of a batch."""
    if not isinstance(y, Tensor):
        raise InputError(
            f"y is a {type(y).__name__}, not a tensor. Hint: pass class indices, torch.tensor(y)"
        )
    if y.ndim != 1 or len(y) != batch:
        raise InputError(
            f"y has shape {tuple(y.shape)}, not ({batch},). Hint: class indices, one for each "
            f"sample, or for a loss probabilities, ({batch}, {num_classes})"
        )
    if y.is_floating_point() or y.dtype.itemsize < 8:
        raise InputError(
            f"y has dtype {y.dtype}, not torch.int64. Hint: pass class indices, y.long()"
        )
    # On a GPU, a check would wait for the device, and cross-entropy itself stops at a label out of
    # range. Fake tensors have no values.
    if type(y) is Tensor and y.device.type == "cpu" and batch:
        _check_range(int(y.min()), int(y.max()), num_classes)


def _check_range(lowest: int, highest: int, num_classes: int) -> None:
    if lowest >= 0 and highest < num_classes:
        return
    hint = ""
    if lowest == -100:
        hint = ". Hint: loss_fn=torch.nn.CrossEntropyLoss() leaves out labels of -100"
    raise InputError(
        f"labels run from {lowest} to {highest}, but there are {num_classes} classes, "
        f"0 to {num_classes - 1}{hint}"
    )
