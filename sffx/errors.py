"""The errors of sffx: one root and a few subclasses, each saying what was wrong and what to do about it."""

from __future__ import annotations


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
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed. Hint: pip install 'sffx[{extra}]'")
