"""The SFF loss: the sum over the blocks of cross-entropy, with goodness as logits (section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.kernels.precision import widened
from sffx.parts import CLASSIFIER, block_name

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# One function for all blocks, one by each block's name, or one for each block in order.
LossFunctions: TypeAlias = (
    LossFunction | Mapping[str, LossFunction | None] | Sequence[LossFunction | None]
)


def sff_loss(goodness: Tensor, y: Tensor, loss_fn: LossFunctions | None = None) -> Tensor:
    """Return the loss of all blocks, a scalar.

    It is the sum over blocks of `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )`. Since it is a sum,
    the gradient of a block does not depend on the number of blocks.

    Args:
        goodness: of all blocks, as the cut model returns it in train mode, (K, B, J).
        y: class indices, (B,), or probabilities of the classes, (B, J), as mixup makes them; or
            what `loss_fn` takes.
        loss_fn: a function of a block's goodness, (B, J), and y that returns the loss of the block,
            a scalar; for example `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`. None stands for
            cross-entropy, the method's own. A mapping gives each block a function of its own by
            name ("block_0", ..., "classifier"); blocks that it leaves out have cross-entropy. A
            list gives one function for each block, the classifier's last.

    Raises:
        InputError: the shapes do not fit, a label is out of range, `loss_fn` returns no scalar, or
            it names other blocks.
    """
    if goodness.ndim != 3:
        raise InputError(
            f"goodness has shape {tuple(goodness.shape)}, not (K, B, J). "
            "Hint: in eval mode the model returns scores; call net.train()"
        )
    functions = loss_functions(loss_fn, len(goodness))
    check_targets(y, goodness.shape[1], goodness.shape[2], functions)
    pairs = zip(goodness, functions, strict=True)
    return total([block_loss(own, y, function) for own, function in pairs])


def loss_functions(loss_fn: LossFunctions | None, count: int) -> list[LossFunction | None]:
    """Return the loss function of each block, None for cross-entropy.

    Args:
        loss_fn: as `sff_loss` takes it.
        count: the number of blocks, the classifier included.

    Raises:
        InputError: it names other blocks, or there are more or fewer functions than blocks.
    """
    if isinstance(loss_fn, (Mapping, nn.ModuleDict)):
        names = [*map(block_name, range(count - 1)), CLASSIFIER]
        unknown = [name for name in loss_fn if name not in names]
        if unknown:
            raise InputError(
                f"loss_fn names {', '.join(map(repr, unknown))}, "
                f"but the blocks are {', '.join(names)}"
            )
        by_name = dict(loss_fn.items())
        return _functions([by_name.get(name) for name in names])
    # A string is a sequence as well.
    if isinstance(loss_fn, (Sequence, nn.ModuleList)) and not isinstance(loss_fn, str):
        if len(loss_fn) != count:
            raise InputError(
                f"loss_fn holds {len(loss_fn)} functions, but there are {count} blocks, "
                "the classifier included"
            )
        return _functions(list(loss_fn))
    return _functions([loss_fn]) * count


def _functions(given: list[Any]) -> list[LossFunction | None]:
    """Return loss functions; raise an InputError if one is nothing that can be called with y."""
    for function in given:
        if isinstance(function, type):
            raise InputError(
                f"loss_fn is the class {function.__name__}. "
                f"Hint: pass an instance, {function.__name__}()"
            )
        if function is not None and not callable(function):
            raise InputError(
                f"loss_fn is {function!r}, not a function. "
                "Hint: pass a callable (goodness, y) -> loss, or None for cross-entropy"
            )
    return given


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
    if isinstance(y, Tensor) and y.device != goodness.device:
        raise InputError(
            f"y is on {y.device}, but the scores of the model are on {goodness.device}. "
            f"Hint: y.to({str(goodness.device)!r})"
        )
    if loss_fn is None:
        # Probabilities must have the dtype of the logits. Class indices stay integers.
        targets = y.to(logits.dtype) if y.is_floating_point() else y
        return F.cross_entropy(logits, targets)
    loss = loss_fn(logits, y)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"loss_fn returned {loss!r}, a {type(loss).__name__}, not a tensor. "
            "Hint: return the loss itself, not its .item()"
        )
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
    y: Tensor, batch: int, num_classes: int, functions: Sequence[LossFunction | None]
) -> None:
    """Raise an InputError if y is neither class indices nor probabilities of the classes.

    Only cross-entropy needs such targets. If each block has a loss function of the user's own, y
    may be anything, and is not checked.
    """
    if None not in functions:
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
    if y.dtype != torch.int64:
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
