"""The check that an exported file gives the scores that torch gives."""

from __future__ import annotations

import torch
from torch import Tensor

from sffx.checks import is_number
from sffx.errors import ExportError, InputError, shown

TOLERANCE_HINT = (
    "Hint: pass a larger tolerance if this much is acceptable; where it is large, a module that is "
    "not traced may do something else for a batch of this size"
)
# An exporter keeps the height and width that it traced where a model computes with them in Python,
# as it does for windows and padding.
OPEN_SIZE_HINT = (
    "Hint: leave dynamic_size out, since the model seems not to allow other sizes; "
    "if this much is acceptable, pass a larger tolerance"
)

Scores = Tensor | tuple[Tensor, ...]


def require_parity(
    scores: Scores,
    expected: Scores,
    tolerance: float,
    place: str,
    engine: str = "ONNX Runtime",
    *,
    dynamic_size: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Raise an ExportError if an engine's scores differ from torch's by more than the tolerance.

    Args:
        scores: of the engine, (B, J); a tuple of them where a file has several outputs.
        expected: torch's scores for the same input.
        tolerance: the largest relative error allowed, max|a - b| / max|b|.
        place: for the message: the input on which they were compared, as "at batch size 3".
        engine: for the message: what ran the file.
        dynamic_size: whether the file's height and width are open, which changes the hint.
        mask: of the input, (B, T), zero at padding, if it has one. Scores of padded tokens, of
            scores (B, T, J), are not compared: an engine may compute another attention where a
            token sees nothing but padding.
    """
    hint = OPEN_SIZE_HINT if dynamic_size else TOLERANCE_HINT
    for actual, wanted in zip(as_tuple(scores), as_tuple(expected), strict=True):
        # Before the error, because tensors of other shapes may agree by broadcasting.
        if actual.shape != wanted.shape:
            raise ExportError(
                f"{engine} returns scores of shape {tuple(actual.shape)}, "
                f"torch of shape {tuple(wanted.shape)}"
            )
        compared = _of_real_tokens(wanted, mask)
        if bool(compared.isnan().any()):
            raise ExportError(
                f"torch's own scores are nan {place}, for normal numbers and for those between 0 "
                "and 1, so nothing could be compared. Hint: let the forward clamp its input to "
                "what it can take"
            )
        error = relative_error(_of_real_tokens(actual, mask), compared)
        # Not `error > tolerance`: a NaN must be refused too.
        if not error <= tolerance:
            raise ExportError(
                f"{engine} and torch differ by a relative error of {error:.3g} {place}; "
                f"the tolerance is {tolerance:g}. {hint}"
            )


def require_tolerance(tolerance: object) -> None:
    """Raise an InputError if a tolerance is no number."""
    if not is_number(tolerance):
        raise InputError(f"tolerance is {shown(tolerance)}. Hint: pass a number, such as 1e-4")


def relative_error(scores: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    # Where all scores are zero, 0 / 0 would be NaN, which counts as a difference.
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((scores.double() - expected.double()).abs().max() / scale.double())


def _of_real_tokens(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return scores (..., B, T, J) with zeros at padding; others as they are."""
    if mask is None or scores.shape[-3:-1] != mask.shape:
        return scores
    return scores.masked_fill(mask[..., None] == 0, 0)


def as_tuple(scores: Scores) -> tuple[Tensor, ...]:
    """Return the scores of each output."""
    return (scores,) if isinstance(scores, Tensor) else tuple(scores)
