"""The folder of an exported early exit: an ONNX file for each block with its head, and a manifest.

`sffx.export.manifest` describes the manifest, which holds a digest of each file. Whoever loads a
folder while it is replaced finds all of the one export or all of the other, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sffx.errors import ExportError, InputError, MissingExtra, first_line
from sffx.export.exit_stage import ExitStage
from sffx.export.manifest import MANIFEST, Manifest, listed_files, read_manifest
from sffx.export.onnx import described_inputs, open_session
from sffx.files import present_folder

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def require_replaceable(folder: Path) -> None:
    """Raise an InputError if a folder holds anything that is not of an exported early exit."""
    if not folder.is_dir():
        return
    try:
        exported = {MANIFEST, *listed_files(json.loads((folder / MANIFEST).read_text()))}
    except (OSError, ValueError, RecursionError):
        exported = set()
    foreign = sorted({each.name for each in folder.iterdir()} - exported)
    if foreign:
        raise InputError(
            f"the folder {str(folder)!r} holds something else than an early exit: "
            f"{', '.join(foreign[:3])}. Hint: name a new folder"
        )


def load(folder: Path) -> tuple[Manifest, tuple[ExitStage, ...]]:
    """Return the manifest and the stages of an exported early exit, on ONNX Runtime.

    Raises:
        InputError: there is none, or a file is missing or is not the one that the manifest
            describes.
        MissingExtra: onnxruntime is not installed.
    """
    place, manifest = _present_manifest(folder)
    while True:
        try:
            return manifest, load_stages(place, manifest)
        except InputError:
            # The folder may have been replaced after its manifest was read.
            newer = _present_manifest(folder)
            if newer == (place, manifest):
                raise
            place, manifest = newer


def _present_manifest(folder: Path) -> tuple[Path, Manifest]:
    """Return where the folder of an export is at this moment, and its manifest.

    Raises:
        InputError: there is none.
    """
    place = present_folder(folder)
    try:
        return place, read_manifest(place)
    except InputError:
        # It may have moved between these two lines.
        place = present_folder(folder)
        return place, read_manifest(place)


def load_stages(folder: Path, manifest: Manifest) -> tuple[ExitStage, ...]:
    """Return the stages that a manifest describes, on ONNX Runtime.

    Raises:
        InputError: a file is missing or is not the one that the manifest describes.
        MissingExtra: onnxruntime is not installed.
    """
    stages = []
    for stage in manifest.stages:
        session = _open(folder / stage.file, stage.sha256)
        outputs = (stage.goodness, *stage.outputs)
        _require_outputs(session, outputs, folder / stage.file)
        _require_named(session, stage.goodness, manifest.class_names)
        run = _runner(session, stage.inputs, outputs)
        stages.append(ExitStage(stage.name, stage.inputs, stage.outputs, stage.macs, run))
    return tuple(stages)


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _open(path: Path, sha256: str) -> InferenceSession:
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime", "export", "EarlyExit.load") from error
    # The content is read once: what is checked is what is opened, even if the file is replaced.
    content = _content(path)
    if digest(content) != sha256:
        raise InputError(
            f"{str(path)!r} is not the file that {MANIFEST} describes: it was changed, or belongs "
            "to another export. Hint: export the model again"
        )
    try:
        return open_session(content)
    except ExportError as error:
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"{str(path)!r} is no ONNX file that can be used: {reason}. "
            "Hint: export the model again"
        ) from error


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"the file {str(path)!r} is missing. Hint: export the model again")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the file {str(path)!r} cannot be read: {error.strerror}. Hint: may this user read it?"
        ) from error


def _require_outputs(session: InferenceSession, names: Sequence[str], path: Path) -> None:
    known = {each.name for each in session.get_outputs()}
    for name in names:
        if name not in known:
            raise InputError(
                f"the file {str(path)!r} has no output {name!r}, which {MANIFEST} names. "
                "Hint: export the model again"
            )


def _require_named(
    session: InferenceSession, goodness: str, class_names: Sequence[str] | None
) -> None:
    """Raise an InputError if a file has scores of more or fewer classes than have names."""
    shape = next(each.shape for each in session.get_outputs() if each.name == goodness)
    classes = shape[-1] if shape else None  # a text where the file leaves it open
    if class_names is not None and isinstance(classes, int) and classes != len(class_names):
        raise InputError(
            f"{MANIFEST} names {len(class_names)} classes, and the files give scores of {classes}. "
            "Hint: export the model again"
        )


def _runner(
    session: InferenceSession, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[..., list[Tensor]]:
    """Return a function that runs a file: from the values of its inputs to those of its outputs."""
    # The exporter leaves out an input that the stage does not use.
    read = {each.name for each in session.get_inputs()}

    def run(*values: Tensor) -> list[Tensor]:
        feed = {}
        for name, value in zip(inputs, values, strict=True):
            if name in read:
                feed[name] = value.detach().cpu().numpy()
        try:
            results = session.run(list(outputs), feed)
        except Exception as error:
            raise InputError(
                f"the file cannot run on this input: {first_line(error)}. "
                f"Hint: it takes {described_inputs(session)}"
            ) from error
        return [torch.from_numpy(result) for result in results]

    return run
