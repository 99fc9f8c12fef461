"""Several labels of a sample, each of which it has or has not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sffx.errors import InputError
from sffx.tasks.missing import MayLackTargets, mean_of_counted
from sffx.tasks.task import Shape, Sums, blocks_that_count, has_values, require_tensor


@dataclass(frozen=True)
class MultiLabel(MayLackTargets):
    """Several labels of a sample. The model's output is logits (B, J), y is 0 and 1, (B, J).

    The scores of a block are logits as well, `s[n, j] = g[n, j] - theta_j`. Goodness alone is never
    negative, so that every label would have a probability of at least one half. So each label has a
    threshold theta_j, which is learned and begins at 1. A head whose goodness has a sign has the
    same offset, which begins at 0.

    The loss of a block is binary cross-entropy, the mean over samples and labels:
    `-mean_nj( y log sigmoid(s) + (1 - y) log sigmoid(-s) )`. y may lie between 0 and 1.

    `sffx.evaluate` reports F1: its mean over the labels ("f1"), that of all labels counted together
    ("f1_micro"), and by label. A label counts as predicted if its score is positive. A label that
    is neither there nor predicted has an F1 of 0, as with scikit-learn.

    Mean average precision is not reported. It ranks all samples by their scores, so it is no sum
    over batches and processes, as every metric here is made of; bins of scores would only be near
    it. `sklearn.metrics.average_precision_score(y, net(x))` computes it from all samples' scores,
    in eval mode.

    With `skip_nan`, labels that are nan are left out, as those that nobody has looked for.
    """

    name: ClassVar[str] = "multilabel"
    form: ClassVar[str] = "labels"
    outputs: ClassVar[str] = "labels"
    loss_name: ClassVar[str] = "binary cross-entropy"
    probability_function: ClassVar[str] = "sigmoid"
    shares: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "f1_micro")

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        return len(shape) == 2 and num_outputs in (None, shape[1])

    def way_to_output(self, shape: Shape) -> str:
        if len(shape) == 1:
            return "for one label return (B, 1), output.unsqueeze(1), and pass y like it"
        if len(shape) > 3:
            return "for labels of pixels pass task=sffx.tasks.MultiLabelSegmentation()"
        return super().way_to_output(shape)

    def count_in_words(self, num_outputs: int) -> str:
        return "1 label" if num_outputs == 1 else super().count_in_words(num_outputs)

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass 0 and 1 for each label, torch.tensor(y)")
        if tuple(y.shape) != (batch, num_outputs):
            raise InputError(
                f"y has shape {tuple(y.shape)}, not {(batch, num_outputs)}. "
                "Hint: 0 or 1 for each label of each sample"
            )
        self.require_shares(y)

    def require_shares(self, y: Tensor) -> None:
        """Raise an InputError if targets are no numbers from 0 to 1, nor nan that is left out."""
        if y.is_complex():
            raise InputError(f"y has dtype {y.dtype}. Hint: pass 0 and 1, y.float()")
        self.require_counted(y)
        if has_values(y):
            _require_between(self.counted(y, y))

    def check_labels(self, y: Any, batch: int, num_outputs: int) -> None:
        self.check_targets(y, batch, num_outputs)
        if has_values(y):
            _require_labels(self.counted(y, y))

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        return torch.zeros(tuple(output), device=device)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        if not self.skip_nan:
            return _cross_entropy(scores, y, "mean")
        is_counted = self.is_counted(y)
        losses = _cross_entropy(scores, y.masked_fill(~is_counted, 0), "none")
        return mean_of_counted(losses, is_counted)

    def mixture(self, scores: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
        kept = blocks_that_count(weights)
        stacked = torch.stack([scores[i] for i in kept])  # (blocks, B, J) or (blocks, B, J, ...)
        shares = stacked.new_tensor([weights[i] for i in kept])
        log_shares = shares.log().reshape(-1, *[1] * (stacked.ndim - 1))
        # The logarithms of the mixed probabilities that a label is there, and that it is not.
        there = torch.logsumexp(F.logsigmoid(stacked) + log_shares, dim=0)
        not_there = torch.logsumexp(F.logsigmoid(-stacked) + log_shares, dim=0)
        return there - not_there

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        return -_cross_entropy(self.counted(scores, y), self.counted(y, y), "none").flatten()

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        is_counted = self.is_counted(y)
        predicted = (scores > 0) & is_counted
        there = (y > 0.5) & is_counted
        return {
            "correct": ((predicted == there) & is_counted).sum(),
            "loss": _cross_entropy(self.counted(scores, y), self.counted(y, y), "sum"),
            "count": is_counted.sum(),
            "found": (predicted & there).sum(0),
            "predicted": predicted.sum(0),
            "there": there.sum(0),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        means = self.mean_metrics(sums)
        of_all = {key: sums[key].sum() for key in ("found", "predicted", "there")}
        return {
            "accuracy": means["accuracy"],
            "f1": float(_f1(sums).mean()),
            "f1_micro": float(_f1(of_all)),
            "loss": means["loss"],
        }

    def by_class(self, sums: Sums) -> tuple[float, ...]:
        return tuple(_f1(sums).tolist())


def _require_between(y: Tensor) -> None:
    is_between = (y >= 0) & (y <= 1)
    if not bool(is_between.all()):
        raise InputError(
            f"y runs from {y.min().item()} to {y.max().item()}. "
            "Hint: 1 where there is the label, and 0 where not"
        )


def _require_labels(y: Tensor) -> None:
    is_label = (y == 0) | (y == 1)
    if not bool(is_label.all()):
        raise InputError("y has values between 0 and 1. Hint: F1 needs labels of 0 and 1")


def _cross_entropy(scores: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Return the binary cross-entropy of logits, in the precision of the scores."""
    return F.binary_cross_entropy_with_logits(scores, y.to(scores.dtype), reduction=reduction)


def _f1(sums: Sums) -> Tensor:
    """Return 2 * found / (predicted + there), of each label or of all together."""
    found = sums["found"].double()
    predicted_and_there = (sums["predicted"] + sums["there"]).double()
    # A label that is neither there nor predicted has an F1 of 0.
    return 2 * found / predicted_and_there.clamp(min=1)
