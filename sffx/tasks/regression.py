"""Numbers of a sample."""

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
class Regression(MayLackTargets):
    """Numbers of a sample. The model's output is (B,) or (B, N), and y is the same.

    A number has no goodness: a mean of squares cannot be negative. So the head of a block is a
    linear readout of its features, `s[n] = W mean_p Y[n, :, p] + b` with the mean over space or
    real tokens; "mlp" pools by regions and has a hidden layer. The loss of a block is the squared
    error, `mean_ni (s[n, i] - y[n, i])^2`. The ensemble is the mean of the blocks' numbers.

    Bring targets to a mean of 0 and a variance of 1 before the training.

    `sffx.evaluate` reports the mean squared error ("mse", which is the loss as well), the mean
    absolute error ("mae"), and R2 over all numbers ("r2", the mean over the N outputs).

    With `skip_nan`, numbers that are nan are left out, as those that nobody measured.
    """

    name: ClassVar[str] = "regression"
    form: ClassVar[str] = "number"
    outputs: ClassVar[str] = "numbers"
    loss_name: ClassVar[str] = "squared error"
    probability_function: ClassVar[str] = ""
    has_goodness: ClassVar[bool] = False
    shapes: ClassVar[str] = "(B,) or (B, N)"
    shares: ClassVar[tuple[str, ...]] = ()
    means: ClassVar[dict[str, str]] = {"mse": "squares", "mae": "absolute", "loss": "squares"}

    def could_be_output(self, shape: Shape, num_outputs: int | None = None) -> bool:
        return len(shape) in (1, 2) and num_outputs in (None, self.num_outputs(shape))

    def num_outputs(self, shape: Shape) -> int:
        return int(shape[1]) if len(shape) == 2 else 1

    def way_to_output(self, shape: Shape) -> str:
        if len(shape) == 3:
            return (
                "for numbers of each token or step, (B, T, N), pass "
                "task=sffx.tasks.TokenRegression(); for a forecast of other steps than those of "
                "the input return output.flatten(1), and pass y like it; for numbers along a "
                "signal, (B, N, T), pass task=sffx.tasks.DenseRegression()"
            )
        if len(shape) > 3:
            return "for numbers of pixels pass task=sffx.tasks.DenseRegression()"
        return super().way_to_output(shape)

    def count_in_words(self, num_outputs: int) -> str:
        return "1 number" if num_outputs == 1 else f"{num_outputs} numbers"

    def fits(self, shape: Shape, output: Shape) -> bool:
        # A head returns (B, N), also where the model returns (B,).
        return tuple(shape) in (tuple(output), (output[0], self.num_outputs(output)))

    def check_targets(self, y: Any, batch: int, num_outputs: int) -> None:
        require_tensor(y, "pass numbers, torch.tensor(y)")
        shapes: list[tuple[int, ...]] = [(batch, num_outputs)]
        if num_outputs == 1:
            shapes.append((batch,))
        if tuple(y.shape) not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise InputError(
                f"y has shape {tuple(y.shape)}, not {wanted}. Hint: the numbers of each sample"
            )
        self.require_numbers(y)

    def require_numbers(self, y: Tensor) -> None:
        """Raise an InputError if targets are no finite floats, nor nan that is left out."""
        require_floats(y)
        self.require_counted(y)
        if has_values(y) and bool(y.isinf().any()):
            raise InputError("y has values that are not finite. Hint: leave these samples out")

    def example_targets(self, output: Shape, device: torch.device | str | None = None) -> Tensor:
        return torch.zeros(tuple(output), device=device)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        wanted = y.to(scores.dtype).flatten()
        if not self.skip_nan:
            return F.mse_loss(scores.flatten(), wanted)
        is_counted = self.is_counted(wanted)
        errors = scores.flatten() - wanted.masked_fill(~is_counted, 0)
        return mean_of_counted(errors.square(), is_counted)

    def compared_with(self, y: Any, scores: Tensor) -> Tensor:
        # Losses of torch broadcast (B, 1) and (B,) to (B, B).
        if isinstance(y, Tensor) and {tuple(y.shape), tuple(scores.shape)} == _single(len(scores)):
            return scores.reshape(y.shape)
        return scores

    def aligned(self, scores: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
        output = scores[-1]
        return [own.reshape(output.shape) for own in scores]

    def mixture(self, scores: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
        terms = [weights[i] * scores[i] for i in blocks_that_count(weights)]
        return torch.stack(terms).sum(dim=0)

    def sums(self, scores: Tensor, y: Tensor) -> Sums:
        found = _columns(scores).double()
        wanted = _columns(y).double()
        is_counted = self.is_counted(wanted)
        if self.skip_nan:
            # Both are 0 where nothing is known, and so are the errors.
            found = torch.where(is_counted, found, 0)
            wanted = torch.where(is_counted, wanted, 0)
        errors = found - wanted
        return {
            "squares": errors.square().sum(),
            "absolute": errors.abs().sum(),
            "squares_by_output": errors.square().sum(0),
            "targets": wanted.sum(0),
            "target_squares": wanted.square().sum(0),
            "samples": is_counted.sum(0),
            "count": is_counted.sum(),
        }

    def metrics(self, sums: Sums) -> dict[str, float]:
        means = self.mean_metrics(sums)
        loss = means.pop("loss")
        return {**means, "r2": float(_r2(sums).mean()), "loss": loss}

    def by_class(self, sums: Sums) -> tuple[float, ...]:
        return tuple(_r2(sums).tolist())


def require_floats(y: Tensor) -> None:
    """Raise an InputError if targets are no floats."""
    if not y.is_floating_point():
        raise InputError(
            f"y has dtype {y.dtype}, no floats. Hint: y.float() for numbers, or for class "
            "indices task=sffx.tasks.Classification() and a model with an output for each class"
        )


def _single(batch: int) -> set[tuple[int, ...]]:
    """Return the two shapes of one number for each sample."""
    return {(batch,), (batch, 1)}


def _columns(values: Tensor) -> Tensor:
    """Return numbers (B,) or (B, N) as (B, N)."""
    return values.unsqueeze(1) if values.ndim == 1 else values


def _r2(sums: Sums) -> Tensor:
    """Return R2 of each output, (N,); where the targets are constant, 1 without errors and else 0.

    This is scikit-learn's definition.
    """
    count = sums["samples"].double().clamp(min=1)
    spread = sums["target_squares"] - sums["targets"].square() / count
    # Of constant targets, rounding leaves a remainder of about this.
    is_constant = spread <= 1e-12 * sums["target_squares"]
    squares = sums["squares_by_output"]
    of_constant = (squares == 0).double()
    return torch.where(is_constant, of_constant, 1 - squares / spread)
