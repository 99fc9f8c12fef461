"""What the tasks of pixels and of tokens share: labels by position, some of which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor

from sffx.checks import is_integer
from sffx.errors import InputError, shown
from sffx.kernels.entropy import summed_cross_entropy
from sffx.tasks.task import Shape, Sums, Task, blocks_that_count, has_values, require_tensor


@dataclass(frozen=True)
class Positions(Task):
    """Classes of positions.

    Attributes:
        ignore_index: the label of positions that are left out of loss and metrics.
        class_axis: of scores, with the batch first.
    """

    ignore_index: int = -100

    per_position: ClassVar[bool] = True
    class_axis: ClassVar[int] = 1
    # The remedy for a model with one logit.
    instead_of_one: ClassVar[str] = "for two classes, give it two logits"

    def __post_init__(self) -> None:
        label = self.ignore_index
        if not is_integer(label):
            raise InputError(
                f"ignore_index is {shown(label)}. Hint: pass an integer; leave it out where every "
                "position counts, since the default, -100, is no class"
            )
        # A checkpoint holds it, and takes no number of numpy.
        object.__setattr__(self, "ignore_index", int(label))

    def require_outputs(self, num_outputs: int) -> None:
        if num_outputs < 2:
            raise InputError(
                "the model returns one logit for each position, but a goodness tells classes "
                f"apart. Hint: {self.instead_of_one}"
            )

    def num_outputs(self, shape: Shape) -> int:
        return int(shape[self.class_axis])

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass a class index for each position, torch.tensor(y)")
        if y.ndim not in self._target_axes() or len(y) != batch:
            raise InputError(
                f"y has shape {tuple(y.shape)}, not {self._target_shapes(batch)}. "
                "Hint: a class index for each position"
            )
        if y.dtype != torch.int64:
            raise InputError(
                f"y has dtype {y.dtype}, not torch.int64. Hint: pass class indices, y.long()"
            )
        if has_values(y):
            self._check_range(y, num_outputs)

    def _target_axes(self) -> tuple[int, ...]:
        """Return the numbers of axes that targets may have."""
        raise NotImplementedError

    def _target_shapes(self, batch: int) -> str:
        raise NotImplementedError

    def _check_range(self, y: Tensor, num_outputs: int) -> None:
        # Faster than to select the labels, since this looks at every pixel in every step.
        lowest, highest = y.masked_fill(y == self.ignore_index, 0).aminmax()
        if lowest >= 0 and highest < num_outputs:
            return
        raise self._out_of_range(y[y != self.ignore_index], num_outputs)

    def _out_of_range(self, labels: Tensor, num_outputs: int) -> InputError:
        """Return the error of labels, without those that are left out."""
        lowest, highest = int(labels.min()), int(labels.max())
        other = highest if highest >= num_outputs else lowest
        return InputError(
            f"labels run from {lowest} to {highest}, but there are {num_outputs} classes, 0 to "
            f"{num_outputs - 1}, and {self.ignore_index} for what is left out. "
            f"Hint: if {other} marks positions to leave out, "
            f"task=sffx.tasks.{type(self).__name__}(ignore_index={other})"
        )

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        count = (y != self.ignore_index).sum().clamp(min=1)
        return self._summed_loss(scores, y) / count

    def _summed_loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Return the sum of cross-entropy over the positions that are not left out."""
        return summed_cross_entropy(scores, y, self.ignore_index, self.class_axis)

    def mixture(self, scores: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
        terms = []
        for i in blocks_that_count(weights):
            terms.append(scores[i].log_softmax(self.class_axis) + log(weights[i]))
        return torch.logsumexp(torch.stack(terms), dim=0)

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        is_counted = y != self.ignore_index
        logs = scores.log_softmax(self.class_axis).movedim(self.class_axis, -1)
        labels = y.masked_fill(~is_counted, 0)
        return logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)[is_counted]

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        is_counted = y != self.ignore_index
        is_correct = scores.argmax(dim=self.class_axis) == y
        return {
            "correct": (is_correct & is_counted).sum(),
            "loss": self._summed_loss(scores, y),
            "count": is_counted.sum(),
        }
