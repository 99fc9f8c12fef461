"""Files and folders that appear whole or not at all.

They are written in a temporary folder beside their place, and then renamed into it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sffx.errors import ExportError, InputError, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_NAME = 255  # bytes that file systems allow
PATIENCE = 2.0  # Seconds to wait for the reader of a named pipe.
# How the names of folders with drafts begin. Abandoned ones are removed, so nothing else may have
# such a name: a folder of the user may well be called ".sffx-cache".
DRAFTS = ".sffx-draft-"
ASIDE = "old"  # in such a folder: the place of an old folder that is moved aside for a moment

# Arguments of the calls that exchange two paths, from the headers of Linux and macOS.
AT_FDCWD = -100
RENAME_EXCHANGE = 2
RENAME_SWAP = 2


def write(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Replace a file as a whole, as `writing` does.

    Raises:
        InputError: `path` cannot be written to.
        ExportError: the file system failed while the file was written.
    """
    with writing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a draft, which replaces the file at `path` when the block ends.

    A reader finds the old file or the new one, never a part of it. If the block raises, the draft
    is removed and the old file stays as it was. The new file keeps the mode of the old one.

    If `path` is a symbolic link, the file behind it is replaced, not the link. A device or a named
    pipe, such as /dev/stdout, is never replaced: the finished draft is copied into it.

        with writing("run.pt") as draft, draft.open("wb") as file:
            torch.save(content, file)

    Args:
        path: of the file; its directory must exist.

    Yields:
        the path to write to. It has the name of the file and lies in a new, empty folder, so other
        temporary files may lie beside it.

    Raises:
        InputError: `path` is a directory, or its directory does not exist or cannot be written to.
        ExportError: the file system failed while the file was written.
    """
    path = as_path(path)
    old = _status(path)
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise InputError(
            f"cannot write to {str(path)!r}: it is a directory. Hint: name a file in it"
        )
    if old is not None and not stat.S_ISREG(old.st_mode):
        with _drafts(path, Path(tempfile.gettempdir())) as folder:
            yield folder / path.name
            _copy(folder / path.name, path)
        return
    # Through symbolic links, because a rename onto a link replaces the link.
    target = Path(os.path.realpath(path))
    with _drafts(path, target.parent) as folder:
        yield folder / path.name
        _sync(folder / path.name)
        _keep_mode(folder / path.name, old)
        os.replace(folder / path.name, target)


@contextmanager
def writing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder, which replaces the folder at `path` when the block ends.

    If the block raises, the new folder is removed and the old one stays as it was. The two change
    places in one step, so at every moment there is one of them at `path`. Where the system or the
    file system cannot do that (see `_swap`), the old one is moved aside for a moment, where
    `present_folder` finds it. If the process is killed in that moment, it stays there.

    Args:
        path: of the folder; its parent must exist, and the old folder must be one to replace.

    Raises:
        InputError: `path` is a file, or its parent does not exist or cannot be written to.
        ExportError: the file system failed while the folder was written.
    """
    path = as_path(path)
    old = _status(path)
    if old is not None and not stat.S_ISDIR(old.st_mode):
        raise InputError(f"cannot write to {str(path)!r}: it is a file. Hint: name a folder")
    target = Path(os.path.realpath(path))
    with _drafts(path, target.parent) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _sync(file)
        _keep_mode(new, old)
        _exchange(new, target, folder / ASIDE / target.name)


def present_folder(path: Path) -> Path:
    """Return where a folder is: at its path, or where `writing_folder` has moved it aside.

    If there is none, it is the path itself.
    """
    if "\0" in str(path) or path.exists():
        return path
    target = Path(os.path.realpath(path))
    for place in target.parent.glob(f"{DRAFTS}*/{ASIDE}"):
        if (place / target.name).is_dir():
            return place / target.name
    return path


def as_path(path: Any) -> Path:
    """Return a path as a `Path`.

    Raises:
        InputError: it is neither a string nor a path, a name in it is too long, or this user may
            not ask what lies there.
    """
    try:
        made = Path(os.fsdecode(path))
    except TypeError as error:
        raise InputError(
            f"the path is {shown(path)}, a {type(path).__name__}. "
            "Hint: pass a string or a pathlib.Path"
        ) from error
    for part in made.parts:
        # Even the question whether there is such a file would be an error of the system.
        if len(part.encode(errors="replace")) > LONGEST_NAME:
            raise InputError(
                f"a name in the path is too long: {part[:20]}… of {len(part)} characters. "
                "Hint: choose a shorter one"
            )
    _require_reachable(made)
    return made


def _require_reachable(path: Path) -> None:
    """Raise an InputError if the system does not say whether there is a file at a path.

    Questions such as `path.is_file()` would end in an error of the system as well.
    """
    try:
        path.exists()
    except OSError as error:
        raise InputError(
            f"cannot tell what lies at {str(path)!r}: {error.strerror or error}. "
            "Hint: may this user enter its folder? Else choose another path"
        ) from error


def _status(path: Path) -> os.stat_result | None:
    """Return what lies at the path, through symbolic links, or None.

    Raises:
        InputError: there can be nothing at the path.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write to {str(path)!r}: {reason}. Hint: choose another path"
        ) from error


def require_folder_of(path: Path, verb: str = "write") -> None:
    """Raise an InputError if the folder of a file to write does not exist, before work for it.

    Args:
        path: of the file.
        verb: what cannot be done, for the message.
    """
    _require_reachable(path)
    if not path.parent.is_dir():
        raise InputError(
            f"cannot {verb} to {str(path)!r}: the folder {str(path.parent)!r} does not exist. "
            "Hint: create it first"
        )


@contextmanager
def _drafts(path: Path, directory: Path) -> Iterator[Path]:
    """Yield a temporary folder for what will lie at `path`.

    It is in the directory of `path`, because a rename works within one file system only. It is a
    folder, because a file in it gets the permissions that any new file gets.
    """
    if not directory.is_dir():
        raise InputError(
            f"cannot write to {str(path)!r}: the directory {str(directory)!r} does not exist. "
            "Hint: create it first"
        )
    try:
        _remove_abandoned(directory)
        folder, lock = _new_drafts(directory)
    except OSError as error:
        raise InputError(
            f"cannot write to the directory {str(directory)!r}: {error.strerror}. "
            "Hint: choose another path"
        ) from error
    try:
        yield folder
    except (OSError, RuntimeError) as error:
        failure = _failure_in(error, folder, path)
        if failure is None:
            raise
        raise ExportError(
            f"cannot write {str(path)!r}: {failure.strerror or failure}. Hint: is the disk full?"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _close(lock)


def _new_drafts(directory: Path) -> tuple[Path, int | None]:
    """Return a new folder for drafts, and the lock that its process holds on it while it lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=DRAFTS, dir=directory))
        lock = _lock(folder)
        # Another process may have taken the folder for abandoned before it was locked.
        if folder.is_dir():
            return folder, lock
        _close(lock)


def _remove_abandoned(directory: Path) -> None:
    """Remove the drafts of processes that were killed: those that no living process has locked."""
    for folder in directory.glob(f"{DRAFTS}*"):
        if not folder.is_dir() or folder.is_symlink() or _holds_the_only_copy(folder):
            continue
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _close(lock)


def _holds_the_only_copy(drafts: Path) -> bool:
    """Return whether an old folder was moved aside into drafts, and nothing took its place."""
    moved = (drafts / ASIDE).glob("*")
    return any(not (drafts.parent / old.name).exists() for old in moved)


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the descriptor that holds the lock.

    The system unlocks it when the process ends, however it ends.

    Returns:
        None if another process has locked it, or if the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _failure_in(error: BaseException, folder: Path, path: Path) -> OSError | None:
    """Return the failure of the file system behind an error, None if it is about another file."""
    # torch.save to an open file turns a full disk into a RuntimeError that does not say so.
    failure = error if isinstance(error, OSError) else error.__context__
    if not isinstance(failure, OSError):
        return None
    if not isinstance(failure.filename, str):
        return failure  # a failed write does not name its file
    named = Path(failure.filename)
    return failure if named == path or folder in named.parents else None


def _sync(file: Path) -> None:
    """Wait until the content is on the disk. A crash after the rename must not lose it."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _keep_mode(new: Path, old: os.stat_result | None) -> None:
    """Give the new file the mode of the old one. Without an old one it keeps its own."""
    if old is not None:
        new.chmod(stat.S_IMODE(old.st_mode))


def _copy(draft: Path, device: Path) -> None:
    """Copy a draft into a device or a named pipe."""
    descriptor = _open_device(device)
    os.set_blocking(descriptor, True)
    with draft.open("rb") as source, open(descriptor, "wb") as sink:
        shutil.copyfileobj(source, sink)


def _open_device(device: Path) -> int:
    """Return a file descriptor to write to; wait a moment for the reader of a pipe.

    Raises:
        InputError: nobody reads the pipe. An ordinary write would wait for a reader for ever.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return os.open(device, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise InputError(
                    f"cannot write to {str(device)!r}: nobody reads this pipe. "
                    "Hint: start the reader first"
                ) from error
        time.sleep(0.01)


def _exchange(new: Path, target: Path, old: Path) -> None:
    """Put the new folder in the place of the target, and move the target away."""
    if not target.exists():
        os.replace(new, target)
    elif not _swap(new, target):
        # One rename cannot replace a folder with files in it.
        old.parent.mkdir()
        os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, and return whether that was possible.

    Linux and macOS can do it, each by a call of its own, on most file systems.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), RENAME_SWAP) == 0
        paths = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other))
        return libc.renameat2(*paths, RENAME_EXCHANGE) == 0
    except (OSError, TypeError, AttributeError):
        return False  # no such library or call, as on Windows
