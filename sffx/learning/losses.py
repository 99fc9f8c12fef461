"""The SFF loss: the sum over the blocks of each block's own loss.

For classes this is cross-entropy, with goodness as logits (section 4.2). For other tasks it is what
the task says (`sffx.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.checks import require_callable
from sffx.errors import InputError, failure_in_words, shown
from sffx.kernels.entropy import SharedCrossEntropy
from sffx.kernels.precision import widened
from sffx.parts import CLASSIFIER, block_name
from sffx.tasks import CLASSIFICATION, Task
from sffx.tasks.records import require_task
from sffx.tasks.task import has_values

# Losses of torch that take classes to lie along axis 1.
_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_FUNCTIONS = (F.cross_entropy, F.nll_loss)

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# One function for all blocks, one by each block's name, or one for each block in order.
LossFunctions: TypeAlias = (
    LossFunction | Mapping[str, LossFunction | None] | Sequence[LossFunction | None]
)


def sff_loss(
    goodness: Tensor | Sequence[Tensor],
    y: Tensor,
    loss_fn: LossFunctions | None = None,
    *,
    task: Task = CLASSIFICATION,
) -> Tensor:
    """Return the loss of all blocks, a scalar.

    It is the sum over blocks of `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )`; for another task,
    of the task's loss. Since it is a sum, the gradient of a block does not depend on the number of
    blocks.

    Args:
        goodness: of all blocks, as the cut model returns it in train mode, (K, B, J); for another
            task a tuple of the scores of each block.
        y: class indices, (B,), or probabilities of the classes, (B, J), as mixup makes them; or
            targets of another task; or what `loss_fn` takes.
        loss_fn: a function of a block's goodness, (B, J), and y that returns the loss of the block,
            a scalar; for example `torch.nn.CrossEntropyLoss(label_smoothing=0.1)`. None stands for
            cross-entropy, the method's own. A mapping gives each block a function of its own by
            name ("block_0", ..., "classifier"); blocks that it leaves out have cross-entropy. A
            list gives one function for each block, the classifier's last.
        task: `net.plan.task`, where it is not classification.

    Raises:
        InputError: the shapes do not fit, a label is out of range, `loss_fn` returns no scalar, or
            it names other blocks; or the batch has no samples, and a block has no `loss_fn`.
    """
    require_task(task)
    _require_all_blocks(goodness, task)
    functions = loss_functions(loss_fn, len(goodness))
    output = goodness[-1].shape
    task = task.settled(output)
    check_targets(y, output[0], task.num_outputs(output), functions, task)
    if None in functions:
        task.require_size(y, True, [output])
    losses = []
    for index, (own, function) in enumerate(zip(goodness, functions, strict=True)):
        name = block_name(index) if index < len(goodness) - 1 else CLASSIFIER
        with explaining_loss(name, own, y):
            losses.append(block_loss(own, y, function, task))
    return total(losses)


def _require_all_blocks(goodness: Any, task: Task) -> None:
    """Raise an InputError if something is not what a cut model returns in train mode."""
    is_tensor = isinstance(goodness, Tensor)
    if task != CLASSIFICATION:
        if is_tensor or not len(goodness):
            raise InputError(
                f"goodness is one {type(goodness).__name__}, but with {task!r} it is a tuple with "
                "the scores of each block. Hint: in eval mode the model returns scores; call "
                "net.train()"
            )
        return
    if not is_tensor:
        raise InputError(
            f"goodness is a {type(goodness).__name__}, not a tensor (K, B, J). Hint: a net whose "
            "task is not classification needs sff_loss(net(x), y, task=net.plan.task), and one "
            "with another objective than 'sff' local_loss(net, x, y)"
        )
    if goodness.ndim != 3:
        raise InputError(
            f"goodness has shape {tuple(goodness.shape)}, not (K, B, J). "
            "Hint: in eval mode the model returns scores; call net.train()"
        )


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
                f"but the blocks are {', '.join(names)}. Hint: name some of these"
            )
        by_name = dict(loss_fn.items())
        return _functions([by_name.get(name) for name in names])
    # A string is a sequence as well.
    if isinstance(loss_fn, (Sequence, nn.ModuleList)) and not isinstance(loss_fn, str):
        if len(loss_fn) != count:
            raise InputError(
                f"loss_fn holds {len(loss_fn)} functions, but there are {count} blocks, "
                "the classifier included. Hint: pass a mapping to name only some of them"
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
                f"loss_fn is {shown(function)}, not a function. "
                "Hint: pass a callable (goodness, y) -> loss, or None for cross-entropy"
            )
        if function is not None:
            require_callable("loss_fn", function, ("goodness", "y"))
    return given


def block_loss(
    goodness: Tensor,
    y: Tensor,
    loss_fn: LossFunction | None = None,
    task: Task = CLASSIFICATION,
) -> Tensor:
    """Return the loss of one block, a scalar.

    Args:
        goodness: of the block, or the classifier's logits, (B, J).
        y: targets, as `sff_loss` takes them.
        loss_fn: as `sff_loss` takes it.
        task: of the model.

    Raises:
        InputError: `loss_fn` returns no scalar, or looks for classes where the tokens are.
    """
    logits = widened(goodness)
    require_device_of(goodness, y)
    if loss_fn is None:
        return task.loss(logits, y)
    _require_class_axis(loss_fn, logits, y, task)
    loss = loss_fn(task.compared_with(y, logits), y)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"loss_fn returned {shown(loss)}, a {type(loss).__name__}, not a tensor. "
            "Hint: return the loss itself, not its .item()"
        )
    if loss.ndim:
        raise InputError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar. "
            "Hint: the mean over the samples"
        )
    return loss


# What torch and losses raise for scores and targets that do not go together. Their subclasses, such
# as torch.OutOfMemoryError, have other reasons and are passed on.
MISMATCHES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    NotImplementedError,
    KeyError,
    AssertionError,
)


@contextmanager
def explaining_loss(name: str, scores: Tensor, y: Any) -> Iterator[None]:
    """Let the error of a loss say for which block, scores and targets it failed.

    Args:
        name: of the block.
        scores: of the block.
        y: targets.

    Raises:
        InputError: instead of torch's error.
    """
    try:
        yield
    except MISMATCHES as error:
        if type(error) not in MISMATCHES:
            raise
        raise InputError(
            f"the loss of {name} failed on scores {_described(scores)} and y {_described(y)}: "
            f"{failure_in_words(error)}. Hint: a loss gets the scores of one block, and y as it "
            "was passed; pass y in the shape, dtype and range that the loss takes, or convert it "
            "in a loss_fn of your own, lambda scores, y: loss(scores, y.long())"
        ) from error


def _described(value: Any) -> str:
    """Write the shape and dtype of a tensor, with its range where it holds integers."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    text = f"{tuple(value.shape)} of {value.dtype}"
    is_of_floats = value.is_floating_point() or value.is_complex()
    if is_of_floats or not value.numel() or not has_values(value):
        return text
    return f"{text} from {value.min().item()} to {value.max().item()}"


def _require_class_axis(loss_fn: LossFunction, goodness: Tensor, y: Any, task: Task) -> None:
    """Raise an InputError if a loss of torch would take the tokens of a sample for its classes."""
    function = getattr(loss_fn, "func", loss_fn)  # of a functools.partial
    is_of_torch = isinstance(function, _CLASS_LOSSES) or function in _CLASS_FUNCTIONS
    has_tokens = getattr(task, "class_axis", 1) == 2
    if is_of_torch and has_tokens and isinstance(y, Tensor) and y.ndim == 2:
        raise InputError(
            f"loss_fn looks for the classes along axis 1, where scores of tokens, "
            f"{tuple(goodness.shape)}, have the tokens. "
            "Hint: lambda scores, y: loss_fn(scores.flatten(0, 1), y.flatten())"
        )


def require_device_of(goodness: Tensor, y: Any) -> None:
    """Raise an InputError if targets are not on the device of the goodness."""
    if isinstance(y, Tensor) and y.device != goodness.device:
        raise InputError(
            f"y is on {y.device}, but the scores of the model are on {goodness.device}. "
            f"Hint: y.to({str(goodness.device)!r})"
        )


def shared_entropy(y: Any, task: Task) -> SharedCrossEntropy | None:
    """Return the cross-entropy of all blocks with class indices, None for other targets."""
    if task == CLASSIFICATION and isinstance(y, Tensor) and y.dtype == torch.int64:
        return SharedCrossEntropy(y)
    return None


def total(losses: list[Tensor]) -> Tensor:
    """Return the sum of the blocks' losses.

    Every way to train calls this one function, so that all give the same value to the bit.
    """
    return torch.stack(losses).sum()


def check_targets(
    y: Any,
    batch: int,
    num_classes: int,
    functions: Sequence[LossFunction | None],
    task: Task = CLASSIFICATION,
) -> None:
    """Raise an InputError if y is no target of the task, or if there are no samples to learn from.

    Only the task's own loss needs such targets. If each block has a loss function of the user's
    own, y may be anything, and is not checked.
    """
    if None in functions:
        task.check_targets(y, batch, num_classes)
        _require_samples(batch)


def _require_samples(batch: int) -> None:
    """Raise an InputError if a batch has no samples, whose mean loss would be no number.

    A loss of the user's own may be a sum, which is 0.
    """
    if batch == 0:
        raise InputError(
            "the batch has 0 samples, so its mean loss would be nan. "
            "Hint: leave out such batches, if len(y): ..."
        )
