"""The precision that experiments train in."""

from __future__ import annotations

import torch

PRECISIONS = ("float32", "bfloat16")


def precision(name: str) -> torch.autocast:
    """Return autocast to "bfloat16", or one that does nothing for "float32"."""
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16")
