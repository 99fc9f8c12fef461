"""What errors and notes say: the line of a model's own code, names in brief, and the way out for a model that is no classifier."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from torch import nn

_VISION = ("backbone", "encoder", "features", "body")


def location(failure: BaseException) -> str:
    """Name the line of the model's code in which something failed."""
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if "/torch/" not in f.filename and "sffx/compiler/" not in f.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else "in torch"


def in_brief(names: Sequence[str], most: int) -> str:
    """Write the first names of a list, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def way_out(model: nn.Module) -> str:
    """Say what to do with a detector, a segmentation network or the like: train the part of it that sees the input as a classifier."""
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    backbone = next((name for name in names if any(word in name for word in _VISION)), names[0] if names else "")
    part = f" (here self.{backbone}, a {type(model.get_submodule(backbone)).__name__})" if backbone else ""
    return (
        f"Hint: sffx cuts classifiers. Of a detector or the like, transform the backbone{part} with a pool and a linear layer behind it, "
        "then put the trained layers back"
    )
