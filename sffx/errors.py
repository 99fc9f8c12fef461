"""The errors of sffx: one root and a few subclasses, each saying what was wrong and what to do about it."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


class SffxError(Exception):
    """The root of every error that sffx raises on purpose."""


class InputError(SffxError, ValueError):
    """An argument of a public function cannot be used."""


class TraceError(SffxError):
    """The model could not be traced into a graph."""


class CutError(SffxError, ValueError):
    """A cut was asked for where none can be made, or the model has no place for one."""


class VerifyError(SffxError):
    """The cut model breaks a promise of the method; this is a bug in sffx or in a custom policy."""


class ExportError(SffxError):
    """The model could not be exported, or the export disagrees with torch; no file was replaced."""


class MissingExtra(SffxError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. Hint: pip install 'sffx[{extra}]'"
        )


_VISION = ("backbone", "encoder", "features", "body")


def location(failure: BaseException) -> str:
    """Name the line of the model's code in which something failed."""
    frames = [
        f
        for f in traceback.extract_tb(failure.__traceback__)
        if "/torch/" not in f.filename and "sffx/compiler/" not in f.filename
    ]
    return (
        f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else "in torch"
    )


def in_brief(names: Sequence[str], most: int) -> str:
    """Write the first names of a list, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def way_out(model: nn.Module) -> str:
    """Say what to do with a detector, a segmentation network or the like: train the part of it that sees the input as a classifier."""
    names = [
        name for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    backbone = next(
        (name for name in names if any(word in name for word in _VISION)), names[0] if names else ""
    )
    part = (
        f" (here self.{backbone}, a {type(model.get_submodule(backbone)).__name__})"
        if backbone
        else ""
    )
    return (
        f"Hint: sffx cuts classifiers. Of a detector or the like, transform the backbone{part} with a pool and a linear layer behind it, "
        "then put the trained layers back"
    )
