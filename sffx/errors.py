"""The errors of sffx: one root and its kinds, and the pieces that their messages share.

Every message says what was wrong, with the value, and then "Hint: " and what to do about it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# In the names of the children of a detector or the like that see the input first.
_BACKBONE_WORDS = ("backbone", "encoder", "features", "body")

# Frames in the files of sffx and of Python say nothing about the model.
PACKAGE = str(Path(__file__).parent) + os.sep
_OF_PYTHON = str(Path(os.__file__).parent) + os.sep


class SffxError(Exception):
    """The root of every error that sffx raises on purpose."""


class InputError(SffxError, ValueError):
    """An argument of a public function cannot be used."""


class TraceError(SffxError):
    """The model could not be traced into a graph."""


class CutError(SffxError, ValueError):
    """The model cannot be cut there, or has no place for a cut at all."""


class VerifyError(SffxError):
    """The cut model breaks a promise of the method: a bug in sffx or in a custom policy."""


class CheckError(SffxError):
    """A cut model differs from the model that it was made from, in values, state or gradients.

    Attributes:
        report: everything that was compared, a `sffx.CheckReport`.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class ProcessError(SffxError, RuntimeError):
    """Another process that trains with this one has failed, or does something else."""


class ExportError(SffxError):
    """A file could not be made or written, or disagrees with torch. An older file stays."""


class MissingExtra(SffxError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Hint: pip install 'sffx[{extra}]'"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop.

    Where that line only announces the second one, return both, or the second alone.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0]
    second = lines[1].strip(" -") if len(lines) > 1 else ""
    if second and line.startswith("Constraints violated"):
        line = second
    if second and line.endswith(":"):
        line = f"{line} {second}"
    return line.rstrip(".:")


def failure_in_words(failure: BaseException) -> str:
    """Return the kind of an error, the first line of its message and the place in the model.

    An error of sffx's own says the place itself where it has one.
    """
    kind = type(failure).__name__
    line = first_line(failure)
    # An error without a message has its kind as its first line.
    what = kind if line == kind else f"{kind}: {line}"
    return what if isinstance(failure, SffxError) else f"{what} ({location(failure)})"


def location(failure: BaseException) -> str:
    """Return the line of the model's code where something failed: "file:line, in function".

    Where only torch's code ran, as in a `Sequential` of torch's layers, it is the innermost layer:
    "in Linear(in_features=3, out_features=3, bias=True)".
    """
    place = _layer_that_failed(failure) or "in torch"
    # The last frame of the model's own is the innermost one.
    for frame in traceback.extract_tb(failure.__traceback__):
        if not is_foreign(frame.filename):
            place = f"{frame.filename}:{frame.lineno}, in {frame.name}"
    return place


def _layer_that_failed(failure: BaseException) -> str:
    """Return the innermost layer of torch that was running when something failed, "" for none."""
    place = ""
    for frame, _ in traceback.walk_tb(failure.__traceback__):
        layer: Any = frame.f_locals.get("self")
        kind = type(layer)
        if "/torch/nn/modules/" in frame.f_code.co_filename and hasattr(layer, "extra_repr"):
            place = f"in {kind.__name__}({layer.extra_repr()})"
    return place


def is_foreign(filename: str) -> bool:
    """Return whether a file is torch's, Python's or sffx's own, and so not the model's."""
    if "/torch/" in filename or filename.startswith(PACKAGE):
        return True
    # Packages may be installed inside the folder of Python's own files.
    return filename.startswith(_OF_PYTHON) and not is_installed(filename)


def is_installed(filename: str) -> bool:
    """Return whether a file belongs to an installed package, and so is not written by the user."""
    return not _INSTALLED.isdisjoint(Path(filename).parts)


# Folders of installed packages.
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def shown(value: object) -> str:
    """Return the text of a value that was given, in one line, cut short where it is long.

    A model that was passed by mistake would fill the screen.
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


# The most characters of a value in a message.
_LONGEST = 100


def in_brief(names: Sequence[str], most: int) -> str:
    """Return the first names of a list, and the number of the others: "a, b and 7 more"."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def backbone_hint(model: nn.Module) -> str:
    """Return what to do with a model that has no task, such as a detector: cut its backbone.

    It follows "Hint: ", or another hint.
    """
    backbone = _backbone(model)
    part = ""
    if backbone:
        kind = type(model.get_submodule(backbone)).__name__
        part = f" (here self.{backbone}, a {kind})"
    return (
        f"of a detector or the like, transform the backbone{part} with a pool and a linear layer "
        "behind it, train it by classification, then put the trained layers back"
    )


def has_parts(model: nn.Module) -> bool:
    """Return whether a child has several layers with weights, as that of a detector has."""
    for child in model.children():
        layers = [each for each in child.modules() if each._parameters]
        if len(layers) > 1:
            return True
    return False


def _backbone(model: nn.Module) -> str:
    """Return the name of the child that most likely is the backbone; "" if none stands out.

    It is called so, or has more than half of the parameters, counted as tensors.
    """
    counts = {}
    for name, child in model.named_children():
        count = len(list(child.parameters()))
        if count:
            counts[name] = count
    for name in counts:
        if any(word in name for word in _BACKBONE_WORDS):
            return name
    largest = max(counts, key=counts.__getitem__, default="")
    return largest if 2 * counts.get(largest, 0) > sum(counts.values()) else ""
