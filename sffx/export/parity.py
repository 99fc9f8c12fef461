"""Whether an exported file says what torch says."""

from __future__ import annotations

import torch
from torch import Tensor

from sffx.errors import ExportError

TOLERANCE_HINT = "Hint: pass a larger tolerance if this much is acceptable"
# Of models that compute with height and width in Python (windows, padding), an exporter keeps what they were when it traced.
OPEN_SIZE_HINT = "Hint: leave dynamic_size out, since the model seems not to allow other sizes; if this much is acceptable, pass a larger tolerance"

Scores = Tensor | tuple[Tensor, ...]


def require_parity(
    scores: Scores,
    expected: Scores,
    tolerance: float,
    place: str,
    engine: str = "ONNX Runtime",
    *,
    dynamic_size: bool = False,
) -> None:
    """Raise an ExportError if an engine's scores differ from torch's by more than is tolerated; `place` says of what they are."""
    hint = OPEN_SIZE_HINT if dynamic_size else TOLERANCE_HINT
    for found, wanted in zip(_each(scores), _each(expected), strict=True):
        _require_equal(found, wanted, tolerance, place, hint, engine)


def _each(scores: Scores) -> tuple[Tensor, ...]:
    return (scores,) if isinstance(scores, Tensor) else tuple(scores)


def _require_equal(
    scores: Tensor, expected: Tensor, tolerance: float, place: str, hint: str, engine: str
) -> None:
    if scores.shape != expected.shape:
        raise ExportError(
            f"{engine} returns scores of shape {tuple(scores.shape)}, torch of shape {tuple(expected.shape)}"
        )
    error = relative_error(scores, expected)
    # Not `error > tolerance`: a NaN must be refused too.
    if not error <= tolerance:
        raise ExportError(
            f"{engine} and torch differ by a relative error of {error:.3g} {place}; the tolerance is {tolerance:g}. {hint}"
        )


def relative_error(scores: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((scores.double() - expected.double()).abs().max() / scale.double())
