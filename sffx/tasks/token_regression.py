"""Numbers of tokens, or of the steps of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sffx.errors import InputError
from sffx.tasks.missing import mean_of_counted
from sffx.tasks.regression import Regression, require_floats
from sffx.tasks.task import Shape, Sums, has_values, require_tensor
from sffx.tasks.tokens import OfTokens, of_other_tokens


@dataclass(frozen=True)
class TokenRegression(OfTokens, Regression):
    """Numbers of tokens. The model's output is (B, T, N), and y is the same; (B, T) for one number.

    Tokens may be the steps of a sequence, as an LSTM returns them. Tokens at which y is nan do not
    count, and neither does padding, which an input `attention_mask` marks. A batch without a token
    that counts is refused.

    The head of a block is a linear readout of each token, `s[n, t] = W Y[n, t] + b`; "mlp" has a
    hidden layer. The loss of a block is the squared error, the mean over the numbers of the tokens
    that count. The norm between two blocks is a layer norm of each token by itself, so a token of
    a causal model does not see those behind it.

    `sffx.evaluate` reports what it reports for `Regression`, over the tokens that count.

    Bring targets to a mean of 0 and a variance of 1 before the training.
    """

    # Padding is nan as well.
    skip_nan: bool = field(default=True, init=False, repr=False, compare=False)

    name: ClassVar[str] = "token-regression"
    form: ClassVar[str] = "token numbers"
    outputs: ClassVar[str] = "numbers of tokens"
    shapes: ClassVar[str] = "(B, T, N)"

    def num_outputs(self, shape: Shape) -> int:
        return int(shape[2])

    def way_to_output(self, shape: Shape) -> str:
        if len(shape) == 2:
            return (
                "for one number of each token return output.unsqueeze(2); for numbers of a sample "
                "pass task=sffx.tasks.Regression()"
            )
        return "return one tensor with the numbers of a token in axis 2"

    def count_in_words(self, num_outputs: int) -> str:
        return f"{super().count_in_words(num_outputs)} for each token"

    def fits(self, shape: Shape, output: Shape) -> bool:
        return tuple(shape) == tuple(output)

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass the numbers of each token, torch.tensor(y)")
        values = _with_axis(y) if num_outputs == 1 else y
        is_of_tokens = values.ndim == 3 and len(values) == batch
        if not is_of_tokens or values.shape[2] != num_outputs:
            raise InputError(
                f"y has shape {tuple(y.shape)}, not ({batch}, T, {num_outputs}). "
                "Hint: the numbers of each token"
            )
        require_floats(y)
        if not has_values(y):
            return
        if bool(y.isinf().any()):
            raise InputError("y has infinite values. Hint: nan leaves a token out")
        if not bool(_is_counted(values).any()):
            raise InputError(
                "y has a number that is nan at each token, so that none counts. "
                "Hint: leave this batch out"
            )

    def without_padding(self, y: Any, mask: Tensor | None) -> Any:
        if mask is None or not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        if y.shape[:2] != mask.shape:
            return y
        is_padding = mask.to(y.device) == 0
        for_each_number = [1] * (y.ndim - 2)
        return y.masked_fill(is_padding.reshape(*mask.shape, *for_each_number), torch.nan)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        y = _like(y, scores).to(scores.dtype)
        is_counted = _is_counted(y)[..., None].expand_as(y)
        errors = torch.where(is_counted, scores - y, 0)
        return mean_of_counted(errors.square(), is_counted)

    def compared_with(self, y: Any, scores: Tensor) -> Tensor:
        is_of_one = isinstance(y, Tensor) and y.ndim == 2 and scores.shape[2] == 1
        return scores.squeeze(2) if is_of_one else scores

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        y = _like(y, scores)
        is_counted = _is_counted(y)
        return super().sums(scores[is_counted], y[is_counted])


def _is_counted(y: Tensor) -> Tensor:
    """Return which tokens count, (B, T)."""
    return ~y.isnan().any(2)


def _like(y: Tensor, scores: Tensor) -> Tensor:
    """Return targets as (B, T, N).

    Raises:
        InputError: they are not of the tokens that the scores are of.
    """
    numbers = _with_axis(y)
    if numbers.shape != scores.shape:
        raise of_other_tokens(scores, y, "the numbers of each token")
    return numbers


def _with_axis(y: Tensor) -> Tensor:
    """Return targets as (B, T, N), also those that lack the axis of a single number."""
    return y.unsqueeze(2) if y.ndim == 2 else y
