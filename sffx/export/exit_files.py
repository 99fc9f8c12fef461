"""The folder of an exported early exit: an ONNX file for each block with its head, and a manifest.

There is a file for each block, and not one for all, because ONNX Runtime computes the whole of a
file. The manifest says how the files are connected:

    {"version": 2,
     "threshold": 0.9,
     "inputs": [{"name": "x", "shape": [3, 8, 8], "dtype": "float32", ...}],
     "batched": ["block_0", "x"],                 values that have a batch axis
     "skips": 1,                                  first blocks without an answer; may be missing
     "class_names": ["cat", ...],                 these three may be missing, too
     "mean": [0.5, ...],
     "std": [0.5, ...],
     "stages": [{"name": "block_0",
                 "file": "block_0.onnx",
                 "sha256": "9f86...",             of the file's content
                 "inputs": ["x"],                 values that it reads
                 "goodness": "goodness_0",        the name of its first output
                 "outputs": ["block_0"],          values that later stages read
                 "macs": 15872},                  multiply-adds for one sample
                ...]}

The digests tie the files to their manifest. Whoever loads a folder while it is replaced finds all
of the one export or all of the other, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sffx.arguments import Arguments, recorded_arguments
from sffx.blocks import Input
from sffx.errors import ExportError, InputError, MissingExtra
from sffx.export.exit_stage import ExitStage
from sffx.export.explain import first_line
from sffx.export.onnx import described_inputs, open_session
from sffx.files import present_folder

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MANIFEST = "manifest.json"
CLASS_NAMES = "class_names"
NORMALISATION = ("mean", "std")
VERSION = 2

# Folders of these versions may be replaced by a new export. Version 1 had no digests.
_REPLACEABLE_VERSIONS = (1, VERSION)

# The fields of the manifest's objects with their types in JSON.
_FIELDS: dict[str, Any] = {
    "version": int,
    "threshold": (int, float),
    "inputs": list,
    "batched": list,
    "stages": list,
}
_INPUT_FIELDS: dict[str, Any] = {
    "name": str,
    "shape": list,
    "dtype": str,
    "high": int,
    "marks_tokens": bool,
}
_STAGE_FIELDS: dict[str, Any] = {
    "name": str,
    "file": str,
    "sha256": str,
    "inputs": list,
    "goodness": str,
    "outputs": list,
    "macs": int,
}


@dataclass(frozen=True)
class StageFile:
    """One stage in the manifest.

    Attributes:
        name: of the block, "block_0".
        file: its ONNX file, a name inside the folder.
        sha256: digest of the file's content, in hexadecimal digits.
        inputs: names of the values that it reads.
        goodness: name of the file's first output, (B, J).
        outputs: names of the values that later stages read.
        macs: multiply-adds for one sample, the head included.
    """

    name: str
    file: str
    sha256: str
    inputs: tuple[str, ...]
    goodness: str
    outputs: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Manifest:
    """What the folder says about itself.

    Attributes:
        threshold: the confidence at which a sample stops.
        inputs: of the model.
        batched: names of the values that have a batch axis, sorted.
        stages: the feature blocks, in order.
        nested: the arguments in which the inputs lie, None where each input is one. In the file
            they are "arguments"; without it the model takes the inputs one by one.
        skips: how many of the first stages have no answer. In the file only where there are some.
        class_names: one for each class, in the order of the scores. In the file only if given, as
            are the next two.
        mean: with which each channel was normalised in training.
        std: likewise.
    """

    threshold: float
    inputs: tuple[Input, ...]
    batched: tuple[str, ...]
    stages: tuple[StageFile, ...]
    nested: Arguments | None = None
    skips: int = 0
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder."""
    content = {"version": VERSION, **asdict(replace(manifest, nested=None))}
    del content["nested"]
    if not manifest.skips:
        del content["skips"]
    for name in (CLASS_NAMES, *NORMALISATION):
        if content[name] is None:
            del content[name]
    arguments = None if manifest.nested is None else manifest.nested.record()
    if arguments is not None:
        content["arguments"] = arguments
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        InputError: there is none, or it is not one of an early exit. The error says why.
    """
    try:
        return _manifest(json.loads((folder / MANIFEST).read_text()))
    except OSError as error:
        problem = f"{MANIFEST} cannot be read: {error.strerror}"
        cause: Exception = error
    except (ValueError, RecursionError) as error:
        problem = f"{MANIFEST} is not the one of an early exit: {first_line(error)}"
        cause = error
    raise InputError(
        f"there is no early exit in {str(folder)!r}: {problem}. "
        "Hint: pass the folder that sffx.export_early_exit wrote"
    ) from cause


def require_replaceable(folder: Path) -> None:
    """Raise an InputError if a folder holds anything that is not of an exported early exit."""
    if not folder.is_dir():
        return
    try:
        exported = {MANIFEST, *_listed_files(json.loads((folder / MANIFEST).read_text()))}
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
        run = _runner(session, stage.inputs, outputs)
        stages.append(ExitStage(stage.name, stage.inputs, stage.outputs, stage.macs, run))
    return tuple(stages)


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _listed_files(content: Any) -> list[str]:
    """Return the files that a manifest names, of this version or an older one.

    Raises:
        ValueError: it is not a manifest.
    """
    _require_fields(content, _FIELDS, "it")
    if content["version"] not in _REPLACEABLE_VERSIONS:
        raise ValueError(f"its version is {content['version']}")
    described = {name: kind for name, kind in _STAGE_FIELDS.items() if name != "sha256"}
    for i, stage in enumerate(content["stages"]):
        _require_fields(stage, described, f"stage {i}")
    return [stage["file"] for stage in content["stages"]]


def _manifest(content: Any) -> Manifest:
    """Return the manifest that a JSON file holds.

    Raises:
        ValueError: it is not a manifest.
    """
    _require_fields(content, _FIELDS, "it")
    if content["version"] != VERSION:
        raise ValueError(
            f"its version is {content['version']}, and this version of sffx reads {VERSION}"
        )
    if not content["threshold"] > 0:
        raise ValueError(f"its threshold is {content['threshold']}, not a number above 0")
    if not content["inputs"] or not content["stages"]:
        raise ValueError("it lists no inputs or no stages")
    inputs = tuple(_input(each, f"input {i}") for i, each in enumerate(content["inputs"]))
    stages = tuple(_stage(each, f"stage {i}") for i, each in enumerate(content["stages"]))
    _require_connected(inputs, stages)
    batched = _names(content["batched"], "'batched'")
    nested = None
    if "arguments" in content:
        nested = recorded_arguments(content["arguments"])
        if nested.names != tuple(each.name for each in inputs):
            raise ValueError("its arguments hold other inputs than it lists")
    skips = content.get("skips", 0)
    if isinstance(skips, bool) or not isinstance(skips, int) or not 0 <= skips < len(stages):
        raise ValueError(f"'skips' of it is {skips!r}, but there are {len(stages)} stages")
    return Manifest(
        float(content["threshold"]),
        inputs,
        batched,
        stages,
        nested,
        skips,
        _optional_list(content, CLASS_NAMES, str),
        *(_optional_list(content, name, (int, float)) for name in NORMALISATION),
    )


def _optional_list(content: dict[str, Any], name: str, kind: Any) -> tuple[Any, ...] | None:
    """Return a list of a manifest that may be missing.

    Raises:
        ValueError: it holds something else.
    """
    if name not in content:
        return None
    values = content[name]
    if not isinstance(values, list) or not all(isinstance(each, kind) for each in values):
        raise ValueError(f"{name!r} of it is {values!r}")
    return tuple(values)


def _require_fields(content: Any, fields: dict[str, Any], place: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{place} is a {type(content).__name__}, not an object")
    for name, kind in fields.items():
        if name not in content:
            raise ValueError(f"{place} has no {name!r}")
        value = content[name]
        # In Python a bool is an int as well.
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{name!r} of {place} is {value!r}")


def _input(content: Any, place: str) -> Input:
    _require_fields(content, _INPUT_FIELDS, place)
    if not isinstance(getattr(torch, content["dtype"], None), torch.dtype):
        raise ValueError(f"'dtype' of {place} is {content['dtype']!r}")
    for length in content["shape"]:
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise ValueError(f"'shape' of {place} is {content['shape']}")
    values = {name: content[name] for name in _INPUT_FIELDS}
    values["shape"] = tuple(content["shape"])
    return Input(**values)


def _stage(content: Any, place: str) -> StageFile:
    _require_fields(content, _STAGE_FIELDS, place)
    file = content["file"]
    # Both kinds of separator count, so that no file outside the folder is opened.
    if PureWindowsPath(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"'file' of {place} is {file!r}, not a name inside the folder")
    values = {name: content[name] for name in _STAGE_FIELDS}
    values["inputs"] = _names(content["inputs"], f"'inputs' of {place}")
    values["outputs"] = _names(content["outputs"], f"'outputs' of {place}")
    return StageFile(**values)


def _names(content: list[Any], place: str) -> tuple[str, ...]:
    for name in content:
        if not isinstance(name, str):
            raise ValueError(f"{place} holds {name!r}, not a name")
    return tuple(content)


def _require_connected(inputs: Sequence[Input], stages: Sequence[StageFile]) -> None:
    """Raise a ValueError if a stage reads a value that nothing before it gives."""
    given = {each.name for each in inputs}
    for stage in stages:
        for name in stage.inputs:
            if name not in given:
                raise ValueError(f"{stage.name} reads {name!r}, which nothing before it gives")
        given.update(stage.outputs)


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
