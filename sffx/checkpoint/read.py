"""Read the file of a checkpoint, and explain why one cannot be read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from sffx.errors import InputError, first_line

# Parts of torch's messages about a file that torch did not write.
NOT_OF_TORCH = ("Unsupported operand", "invalid load key")


def read(path: Path, trust: bool) -> Any:
    """Return what a file of `torch.save` holds, on the CPU.

    Raises:
        InputError: there is no such file, it is no checkpoint or damaged, or it holds Python
            objects and is not trusted.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder. Hint: name the file in it")
    if path.exists() and not path.is_file():
        raise InputError(
            f"{str(path)!r} is a pipe or a device, which torch cannot load from. "
            "Hint: copy what it holds into a file"
        )
    if not path.is_file():
        raise InputError(
            f"there is no file {str(path)!r}. Hint: write it with sffx.save_checkpoint"
        )
    require_undamaged(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        raise InputError(f"{str(path)!r} {_why_unreadable(error, trust)}") from error


def require_undamaged(path: Path) -> None:
    """Raise an InputError if a part of a file does not have the checksum that torch wrote for it.

    `torch.load` does not look at checksums. So a weight in which a bit has flipped would be loaded.
    """
    # Older formats have no checksums, and torch can be told to write none.
    if not zipfile.is_zipfile(path) or not torch.serialization.get_crc32_options():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # which one depends on the bit: names and flags may be wrong
        damaged = first_line(error)
    if damaged is not None:
        raise InputError(
            f"{str(path)!r} is damaged, its checksums do not fit: {damaged}. "
            "Hint: copy the file again, or take an older one"
        )


def _why_unreadable(error: Exception, trust: bool) -> str:
    """Return why `torch.load` failed, and a hint; the name of the file goes before it."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"cannot be loaded: {first_line(error)}. "
            "Hint: run the command where the code of the model lies, or install it"
        )
    if isinstance(error, EOFError):
        return (
            "is no checkpoint of torch: it is empty, or ends too early. "
            "Hint: write it with sffx.save_checkpoint"
        )
    if not isinstance(error, pickle.UnpicklingError):
        return (
            f"cannot be loaded: {type(error).__name__}: {first_line(error)}. "
            "Hint: is the file whole, and did torch.save write it?"
        )
    is_foreign = any(sign in str(error) for sign in NOT_OF_TORCH)
    # A trusted file may hold Python objects, so these are not the reason.
    if is_foreign or trust:
        return "is no checkpoint of torch. Hint: write it with sffx.save_checkpoint"
    return (
        "holds Python objects, not weights alone, and loading it would run code that lies in it. "
        "Hint: sffx.save_checkpoint saves without them; if you know where the file comes from, "
        "trust it: load_checkpoint(path, trust=True), sffx-export --trust"
    )
