"""Whether an exported file says what torch says."""

from __future__ import annotations

import torch
from torch import Tensor

from sffx.errors import ExportError


def require_parity(scores: Tensor, expected: Tensor, tolerance: float, place: str, engine: str = "ONNX Runtime") -> None:
    """Raise an ExportError if an engine's scores differ from torch's by more than is tolerated; `place` says of what they are."""
    if scores.shape != expected.shape:
        raise ExportError(f"{engine} returns scores of shape {tuple(scores.shape)}, torch of shape {tuple(expected.shape)}")
    error = relative_error(scores, expected)
    # Not `error > tolerance`: a NaN must be refused too.
    if not error <= tolerance:
        raise ExportError(
            f"{engine} and torch differ by a relative error of {error:.3g} {place}; the tolerance is {tolerance:g}. "
            "Hint: pass a larger tolerance if this much is acceptable"
        )


def relative_error(scores: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((scores.double() - expected.double()).abs().max() / scale.double())
