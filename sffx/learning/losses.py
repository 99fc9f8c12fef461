"""The SFF loss: the sum over the blocks of cross-entropy with a block's goodness as logits (section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError


def sff_loss(goodness: Tensor, y: Tensor) -> Tensor:
    """Return the loss of all blocks, a scalar: the sum over blocks of `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )`.

    The sum keeps a block's gradient independent of how many blocks there are.

    Args:
        goodness: what the cut model returns in train mode, (K, B, J).
        y: class indices, (B,).

    Raises:
        InputError: the shapes do not fit, or a label is out of range.
    """
    if goodness.ndim != 3:
        raise InputError(
            f"goodness has shape {tuple(goodness.shape)}, not (K, B, J). Hint: in eval mode the model returns scores; call net.train()"
        )
    check_labels(y, goodness.shape[1], goodness.shape[2])
    return total([block_loss(g, y) for g in goodness])


def block_loss(goodness: Tensor, y: Tensor) -> Tensor:
    """Return the loss of one block, a scalar, from its goodness or logits (B, J) and class indices (B,)."""
    return F.cross_entropy(goodness if goodness.dtype.itemsize > 2 else goodness.float(), y)


def total(losses: list[Tensor]) -> Tensor:
    """Add up the losses of the blocks; one function, so that every way to train gives the same value to the bit."""
    return torch.stack(losses).sum()


def check_pair(batch: object) -> None:
    """Check that what a loader yielded is a pair (x, y).

    Raises:
        InputError: it is not; says what it is.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise InputError(f"the loader yielded a {type(batch).__name__}, not a pair (x, y). Hint: wrap the loader in a generator of pairs")


def check_labels(y: Tensor, batch: int, num_classes: int) -> None:
    """Check that labels are class indices that fit.

    Raises:
        InputError: they do not; says what they are and what they should be.
    """
    if not isinstance(y, Tensor):
        raise InputError(f"y is a {type(y).__name__}, not a tensor. Hint: pass class indices, torch.tensor(y)")
    if y.ndim != 1 or len(y) != batch:
        raise InputError(f"y has shape {tuple(y.shape)}, not ({batch},). Hint: class indices, one for each sample")
    if y.is_floating_point() or y.dtype.itemsize < 8:
        raise InputError(f"y has dtype {y.dtype}, not torch.int64. Hint: pass class indices, y.long()")
    # On a GPU the check would wait for the device (there, cross-entropy itself stops at a label out of range); fake tensors have no values.
    if type(y) is Tensor and y.device.type == "cpu" and batch and (y.min() < 0 or y.max() >= num_classes):
        raise InputError(f"labels run from {int(y.min())} to {int(y.max())}, but there are {num_classes} classes, 0 to {num_classes - 1}")
