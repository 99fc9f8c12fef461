"""Classes of a sample: the task of the paper, and the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.tasks.task import Shape, Sums, Task, blocks_that_count, has_values, require_tensor


@dataclass(frozen=True)
class Classification(Task):
    """Classes of a sample. The model's output is logits (B, J), y is class indices (B,).

    The loss of a block with goodness g is `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )` (section
    4.2). A loss also takes probabilities of the classes, (B, J), as mixup makes them.
    """

    name: ClassVar[str] = "classification"
    has_confidence: ClassVar[bool] = True

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        return len(shape) == 2 and num_outputs in (None, shape[1])

    def require_outputs(self, num_outputs: int) -> None:
        if num_outputs < 2:
            raise InputError(
                "the model returns one logit, but a goodness tells classes apart. "
                "Hint: for two classes, give it two logits, or task=sffx.tasks.MultiLabel(), whose "
                "targets are 0 and 1"
            )

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass class indices, torch.tensor(y)")
        if y.is_floating_point() and tuple(y.shape) == (batch, num_outputs):
            _check_probabilities(y)
            return
        self.check_labels(y, batch, num_outputs)

    def check_labels(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass class indices, torch.tensor(y)")
        if y.ndim != 1 or len(y) != batch:
            raise InputError(
                f"y has shape {tuple(y.shape)}, not ({batch},). Hint: class indices, one for each "
                f"sample, or for a loss probabilities, ({batch}, {num_outputs}) floats"
            )
        if y.dtype != torch.int64:
            raise InputError(
                f"y has dtype {y.dtype}, not torch.int64. Hint: pass class indices, y.long()"
            )
        if has_values(y):
            _check_range(int(y.min()), int(y.max()), num_outputs)

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        return torch.zeros(output[0], dtype=torch.int64, device=device)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        # Probabilities must have the dtype of the logits. Class indices stay integers.
        targets = y.to(scores.dtype) if y.is_floating_point() else y
        return F.cross_entropy(scores, targets)

    def gathered(self, scores: Sequence[Tensor]) -> Any:
        # In train mode the heads of some objectives return other columns than the classifier.
        if any(own.shape != scores[0].shape for own in scores):
            return tuple(scores)
        return torch.stack(tuple(scores))

    def mixture(self, scores: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
        kept = blocks_that_count(weights)
        stacked = torch.stack([scores[i] for i in kept])  # (blocks, B, J)
        shares = stacked.new_tensor([weights[i] for i in kept])
        log_shares = shares.log()[:, None, None]
        return torch.logsumexp(stacked.log_softmax(2) + log_shares, dim=0)

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(scores, y, reduction="none")

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        is_correct = scores.argmax(dim=1) == y
        return {
            "correct": is_correct.sum(),
            "loss": F.cross_entropy(scores, y, reduction="sum"),
            "count": torch.tensor(len(y), device=y.device),
        }


# The task of a cut model that says nothing else.
CLASSIFICATION = Classification()


def _check_probabilities(y: Tensor) -> None:
    """Raise an InputError if rows are not probabilities; their sum may be off by rounding."""
    if not has_values(y):
        return
    sums = y.float().sum(dim=1)
    if bool((y >= 0).all()) and bool(((sums - 1).abs() < 0.02).all()):
        return
    worst = sums[(sums - 1).abs().argmax()].item()
    raise InputError(
        f"y is floats from {y.min().item():.4g} to {y.max().item():.4g} with rows that sum up to "
        f"{worst:.4g}, not probabilities of the classes. Hint: torch.softmax for scores, "
        "task=sffx.tasks.MultiLabel() for 0 and 1 of several labels, "
        "task=sffx.tasks.Regression() for numbers"
    )


def _check_range(lowest: int, highest: int, num_classes: int) -> None:
    if lowest >= 0 and highest < num_classes:
        return
    hint = "the model needs a logit for each class"
    if lowest == -100:
        hint = "loss_fn=torch.nn.CrossEntropyLoss() leaves out labels of -100"
    elif lowest == 1 and highest == num_classes:
        hint = "the first class is 0, pass y - 1"
    raise InputError(
        f"labels run from {lowest} to {highest}, but there are {num_classes} classes, "
        f"0 to {num_classes - 1}. Hint: {hint}"
    )
