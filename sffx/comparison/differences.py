"""How two outcomes differ, as numbers and in words."""

from __future__ import annotations

import torch
from torch import Tensor

from sffx.comparison.runs import tolerance


def gradient_error(expected: Tensor | None, found: Tensor | None, largest: float) -> float:
    """Return the largest error of a gradient, relative to it, or to the largest of all."""
    if expected is None or not expected.numel():
        return 0.0
    if found is None:
        return float("inf") if bool(expected.any()) else 0.0
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    if not expected.isfinite().all():
        return 0.0
    # Before a batch norm a bias has no gradient but noise.
    size = max(float(expected.abs().max()), 1e-3 * largest)
    error = float((found - expected).abs().max())
    return error / size if size else error


def tolerance_of(gradients: dict[str, Tensor | None]) -> float:
    """Return the tolerance for gradients, by their dtypes."""
    return max(tolerance(each.dtype) for each in gradients.values() if each is not None)


def difference_in_words(found: Tensor, expected: Tensor) -> str:
    """Write how logits differ."""
    if found.shape != expected.shape:
        return f"the logits have shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"the logits are of {found.dtype}, not {expected.dtype}"
    return "the logits have other values"


def error_in_words(failure: Exception) -> str:
    """Write the kind of an error and the first sentence of its message."""
    sentence = str(failure).strip().split("\n")[0].split(". ")[0]
    return f"{type(failure).__name__}: {sentence}" if sentence else type(failure).__name__
