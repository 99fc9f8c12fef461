"""What the tasks of tokens share; classes of tokens, and the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar

import torch
from torch import Tensor

from sffx.errors import InputError
from sffx.tasks.positions import Positions
from sffx.tasks.task import Maps, Shape, Sums, Task


@dataclass(frozen=True)
class OfTokens(Task):
    """A task whose output is (B, T, N), with N outputs at each token, or step of a sequence."""

    per_position: ClassVar[bool] = True
    norms_tokens: ClassVar[bool] = True

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        return len(shape) == 3 and num_outputs in (None, shape[2])

    def why_not_scored(
        self, shape: Shape, channel_axis: int, output: Shape, maps: Maps = tuple
    ) -> str:
        tokens = 3 - channel_axis  # the axis that is neither batch nor channels
        if len(shape) == 3 and shape[tokens] == output[1]:
            return ""
        return f"its value does not have the {output[1]} tokens of the model's output"


@dataclass(frozen=True)
class TokenClassification(OfTokens, Positions):
    """Classes of tokens. The model's output is logits (B, T, J), y is class indices (B, T).

    The goodness of a block at a token is the square of its auxiliary convolution there, with no
    mean over the tokens: `g[n, t, j] = (conv_k(Y)[n, t, j])^2`. The loss of a block is
    cross-entropy with goodness as logits, the mean over the tokens of the batch that count:
    `-mean_nt( g[n, t, y_nt] - log sum_j exp g[n, t, j] )`. Tokens with the label `ignore_index` do
    not count, and neither does padding, which an input `attention_mask` marks. A batch without a
    token that counts has a loss of 0.

    The norm between two blocks is a layer norm of each token by itself, since the goodness of a
    token is in the token's own length.

    `sffx.evaluate` reports the accuracy and the loss over the tokens that count.

    Attributes:
        ignore_index: the label of tokens that are left out.
    """

    name: ClassVar[str] = "tokens"
    form: ClassVar[str] = "token"
    outputs: ClassVar[str] = "classes of tokens"
    shapes: ClassVar[str] = "(B, T, J)"
    class_axis: ClassVar[int] = 2

    def _target_axes(self) -> tuple[int, ...]:
        return (2,)

    def _target_shapes(self, batch: int) -> str:
        return f"({batch}, T)"

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        return torch.zeros(tuple(output[:2]), dtype=torch.int64, device=device)

    def without_padding(self, y: Any, mask: Tensor | None) -> Any:
        is_of_same_tokens = isinstance(y, Tensor) and mask is not None and y.shape == mask.shape
        if not is_of_same_tokens:
            return y
        assert mask is not None  # for mypy, which does not see it above
        return y.masked_fill(mask.to(y.device) == 0, self.ignore_index)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        _require_same_tokens(scores, y)
        return super().loss(scores, y)

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        _require_same_tokens(scores, y)
        return super().sums(scores, y)


@dataclass(frozen=True)
class LanguageModel(TokenClassification):
    """The next token. The model's output is logits (B, T, V), y is token indices (B, T).

    y is the input itself, or the input with `ignore_index` where tokens are left out. The task
    shifts it: the scores at a token are compared with the token after it. So the last token's
    scores have no target. Goodness, loss and norm are those of `TokenClassification`.

    The paper's head has V times C weights for each block. With a large vocabulary pass
    `goodness="shared"`: a small adapter, then a read-only copy of the model's own output layer,
    which all blocks share (`sffx.learning.shared_output`).

    `sffx.evaluate` reports the perplexity, `exp(loss)`, the accuracy and the loss.

    Attributes:
        ignore_index: the index of tokens that are not predicted.
    """

    name: ClassVar[str] = "language"
    outputs: ClassVar[str] = "tokens to choose from"

    def require_inputs(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        for tokens in inputs:
            if self._are_next(y, tokens):
                raise InputError(
                    "y is the input shifted by one token, y[:, :-1] == x[:, 1:], but the task "
                    "LanguageModel shifts y by itself: it would learn the token after the next. "
                    "Hint: pass the input as y, local_loss(net, tokens, tokens)"
                )

    def _are_next(self, y: Tensor, tokens: Tensor) -> bool:
        """Whether targets are the tokens after those of an input, and not the input itself."""
        if y.shape != tokens.shape:
            return False
        is_counted = y != self.ignore_index
        if bool(((y == tokens) | ~is_counted).all()):
            return False
        early = is_counted[:, :-1]
        return bool(early.any() and ((y[:, :-1] == tokens[:, 1:]) | ~early).all())

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        return super().loss(scores, self._shifted(y))

    def log_likelihoods(self, scores: Tensor, y: Tensor) -> Tensor:
        return super().log_likelihoods(scores, self._shifted(y))

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        return super().sums(scores, self._shifted(y))

    def metrics(self, sums: Sums) -> dict[str, float]:
        means = self.mean_metrics(sums)
        # The exponential of a large loss is no float.
        perplexity = exp(means["loss"]) if means["loss"] < 700 else float("inf")
        return {"accuracy": means["accuracy"], "perplexity": perplexity, "loss": means["loss"]}

    def _shifted(self, y: Tensor) -> Tensor:
        """Return for each token the one after it, and `ignore_index` for the last one.

        The targets are shifted and not the scores, whose slice would be copied.
        """
        none = y.new_full((len(y), 1), self.ignore_index)
        return torch.cat([y[:, 1:], none], dim=1)


def _require_same_tokens(scores: Tensor, y: Tensor) -> None:
    if scores.shape[:2] != y.shape:
        raise of_other_tokens(scores, y, "a label for each token")


def of_other_tokens(scores: Tensor, y: Tensor, hint: str) -> InputError:
    """Return the error of targets that are not of the tokens that scores are of."""
    return InputError(
        f"y has shape {tuple(y.shape)}, but the scores are of (B, T) = "
        f"{tuple(scores.shape[:2])}. Hint: {hint}"
    )
