"""Files that appear whole or not at all: written in a folder beside their place, then renamed into it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sffx.errors import ExportError, InputError


def target_file(path: Path, example: str) -> Path:
    """Return the file that `path` names, through symbolic links: the rename must replace the file, not the link to it.

    Args:
        path: as the caller gave it.
        example: a file name for the hint, such as "net.onnx".

    Raises:
        InputError: `path` is a directory, or lies in one that does not exist.
    """
    target = path.resolve()
    if target.is_dir():
        raise InputError(
            f"{str(path)!r} is a directory. Hint: name the file, as in {str(path / example)!r}"
        )
    require_directory(target.parent)
    return target


def require_directory(directory: Path) -> None:
    """Raise an InputError if there is no such directory."""
    if not directory.is_dir():
        raise InputError(f"the directory {str(directory)!r} does not exist. Hint: create it first")


@contextmanager
def draft_beside(target: Path, name: str) -> Iterator[Path]:
    """Yield a file of that name in a temporary folder beside the target, so that one rename, which is atomic, can put it in place.

    A folder, not a temporary file, because the file in it then gets the permissions that any new file gets.

    Raises:
        InputError: the target's directory cannot be written to.
        ExportError: the file system failed while the file was written.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=".sffx-", dir=target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write to the directory {str(target.parent)!r}: {error.strerror}. Hint: choose another path"
        ) from error
    with folder as place:
        try:
            yield Path(place) / name
        except OSError as error:
            raise ExportError(
                f"cannot write {str(target)!r}: {error.strerror or error}. Hint: is the disk full?"
            ) from error
