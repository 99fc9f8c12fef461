"""The manifest of an exported early exit, in a folder with a file for each block.

There is a file for each block, and not one for all, because ONNX Runtime computes the whole of a
file. The manifest says how the files are connected:

    {"version": 2,
     "threshold": 0.9,
     "inputs": [{"name": "x", "shape": [3, 8, 8], "dtype": "float32", ...}],
     "batched": ["block_0", "x"],                 values that have a batch axis
     "axes": {"order": {"axis": 1, ...}},         of those where it is not the first; version 3
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

The digests tie the files to their manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from sffx.arguments import Arguments, recorded_arguments
from sffx.blocks import BatchAxis, Input
from sffx.errors import InputError, first_line
from sffx.export.exit_stage import FIRST_AXIS
from sffx.export.metadata import checked_normalisation

MANIFEST = "manifest.json"
CLASS_NAMES = "class_names"
NORMALISATION = ("mean", "std")
# Who reads version 2 alone would take the first axis for the batch, whatever "axes" says.
VERSION = 2
VERSION_WITH_AXES = 3

# Folders of these versions may be replaced by a new export. Version 1 had no digests.
_REPLACEABLE_VERSIONS = (1, VERSION, VERSION_WITH_AXES)

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
        batched: the batch axes of the values that have one, by name.
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
    batched: Mapping[str, BatchAxis]
    stages: tuple[StageFile, ...]
    nested: Arguments | None = None
    skips: int = 0
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder."""
    # The arguments write a record of their own, further down.
    content = {"version": VERSION, **asdict(replace(manifest, nested=None))}
    del content["nested"]
    axes = {
        name: content["batched"][name]
        for name, axis in manifest.batched.items()
        if axis != FIRST_AXIS
    }
    content["batched"] = sorted(manifest.batched)
    if axes:
        content |= {"version": VERSION_WITH_AXES, "axes": axes}
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


def listed_files(content: Any) -> list[str]:
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
    if content["version"] not in (VERSION, VERSION_WITH_AXES):
        raise ValueError(
            f"its version is {content['version']}, and this version of sffx reads {VERSION} and "
            f"{VERSION_WITH_AXES}"
        )
    if not content["threshold"] >= 0:
        raise ValueError(f"its threshold is {content['threshold']}, not a number from 0 on")
    if not content["inputs"] or not content["stages"]:
        raise ValueError("it lists no inputs or no stages")
    inputs = tuple(_input(each, f"input {i}") for i, each in enumerate(content["inputs"]))
    stages = tuple(_stage(each, f"stage {i}") for i, each in enumerate(content["stages"]))
    _require_connected(inputs, stages)
    batched = dict.fromkeys(_names(content["batched"], "'batched'"), FIRST_AXIS)
    batched.update(_axes(content.get("axes", {})))
    nested = None
    if "arguments" in content:
        nested = recorded_arguments(content["arguments"])
        if nested.names != tuple(each.name for each in inputs):
            raise ValueError("its arguments hold other inputs than it lists")
    skips = content.get("skips", 0)
    if isinstance(skips, bool) or not isinstance(skips, int) or not 0 <= skips < len(stages):
        raise ValueError(f"'skips' of it is {skips!r}, but there are {len(stages)} stages")
    normalisation = [_optional_list(content, name, (int, float)) for name in NORMALISATION]
    try:
        checked_normalisation(inputs, *normalisation)
    except InputError as error:
        # Its hint is for who exports.
        problem, _, _ = str(error).partition(". Hint: ")
        raise ValueError(problem) from error
    return Manifest(
        float(content["threshold"]),
        inputs,
        batched,
        stages,
        nested,
        skips,
        _optional_list(content, CLASS_NAMES, str),
        *normalisation,
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


def _axes(content: Any) -> dict[str, BatchAxis]:
    """Return the batch axes of the values where it is not the first one.

    Raises:
        ValueError: it is something else.
    """
    axes = {}
    if not isinstance(content, dict):
        raise ValueError(f"'axes' of it is {content!r}")
    for name, axis in content.items():
        _require_fields(axis, dict.fromkeys(_AXIS_FIELDS, int), f"the axis of {name!r}")
        index, rows, slower = (axis[field] for field in _AXIS_FIELDS)
        if index < 0 or rows < 1 or slower < 1 or rows % slower:
            raise ValueError(f"the axis of {name!r} is {axis}")
        axes[name] = BatchAxis(index, rows, slower)
    return axes


_AXIS_FIELDS = ("axis", "rows", "slower")


def _stage(content: Any, place: str) -> StageFile:
    _require_fields(content, _STAGE_FIELDS, place)
    file = content["file"]
    # Both kinds of separator count, so that no file outside the folder is opened.
    if PureWindowsPath(file).name != file or file in ("", ".", ".."):
        raise ValueError(f"'file' of {place} is {file!r}, not a name inside the folder")
    if content["macs"] < 0:
        raise ValueError(f"'macs' of {place} is {content['macs']}, not a number from 0 on")
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
    """Raise a ValueError if a stage reads what nothing before it gives, or is there twice."""
    given = {each.name for each in inputs}
    files: set[str] = set()
    for stage in stages:
        if stage.file in files:
            raise ValueError(f"{stage.file!r} is the file of two stages")
        files.add(stage.file)
        for name in stage.inputs:
            if name not in given:
                raise ValueError(f"{stage.name} reads {name!r}, which nothing before it gives")
        for name in stage.outputs:
            if name in given:
                raise ValueError(f"{stage.name} gives {name!r}, which is there before it")
            given.add(name)
