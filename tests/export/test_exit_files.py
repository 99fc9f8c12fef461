"""The folder of an exported early exit: a manifest that is wrong says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import sffx
from sffx.blocks import BatchAxis, Input
from sffx.export import exit_files
from sffx.export.exit_files import digest
from sffx.export.manifest import Manifest, StageFile, read_manifest, write_manifest

MANIFEST = Manifest(
    threshold=0.5,
    inputs=(Input("x", (6,), "float32"),),
    batched={"block_0": BatchAxis(0), "x": BatchAxis(0)},
    stages=(
        StageFile("block_0", "block_0.onnx", "00", ("x",), "goodness_0", ("block_0",), 30),
        StageFile("block_1", "block_1.onnx", "11", ("block_0",), "goodness_1", (), 15),
    ),
    class_names=("cat", "dog"),
    mean=(0.5,),
    std=(0.25,),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    net = sffx.transform(nn.Sequential(*layers), "layer", torch.zeros(1, 6))
    return sffx.export_early_exit(
        net,
        tmp_path_factory.mktemp("exit") / "net",
        0.7,
        class_names=["a", "b", "ü"],
        mean=[0.5],
        std=[0.25],
    )


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "net"))


def changed(content: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """Return JSON with one value set, or removed where it is None."""
    content = json.loads(json.dumps(content))
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    if value is None:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folded = {**MANIFEST.batched, "side": BatchAxis(1, rows=6, slower=2)}
    for manifest in (MANIFEST, dataclasses.replace(MANIFEST, batched=folded)):
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest


def test_the_threshold_that_was_written_is_the_default(exported: Path) -> None:
    assert sffx.EarlyExit.load(exported).threshold == 0.7
    assert sffx.EarlyExit.load(exported, threshold=0.2).threshold == 0.2


def test_names_and_normalisation_are_kept(exported: Path) -> None:
    runner = sffx.EarlyExit.load(exported)
    assert runner.class_names == ("a", "b", "ü")
    assert (runner.mean, runner.std) == ((0.5,), (0.25,))


def test_an_export_without_names_has_none(folder: Path) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    for name in ("class_names", "mean", "std"):
        del content[name]
    file.write_text(json.dumps(content))
    runner = sffx.EarlyExit.load(folder)
    assert (runner.class_names, runner.mean, runner.std) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a", "b"]}, "2 class names, but the model has 3"),
        ({"class_names": "abc"}, "class_names is 'abc'"),
        ({"mean": [0.5]}, "std is None"),
        ({"mean": [0.5], "std": [0]}, "those of std above 0"),
    ],
)
def test_names_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    net = sffx.transform(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), "layer")
    with pytest.raises(sffx.InputError, match=message):
        sffx.export_early_exit(net, tmp_path / "net", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [lambda x: x, np.flip, np.asfortranarray])
def test_arrays_of_numpy_are_answered_like_tensors(exported: Path, change: Any) -> None:
    runner = sffx.EarlyExit.load(exported)
    array = change(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    array.flags.writeable = False
    tensor = torch.tensor(array.tolist())
    assert torch.equal(runner(array).scores, runner(tensor).scores)
    assert torch.equal(runner.cumulative({"input": array}), runner.cumulative(tensor))


def test_an_array_of_strings_is_refused(exported: Path) -> None:
    with pytest.raises(sffx.InputError, match="Hint: "):
        sffx.EarlyExit.load(exported)(np.array(["a"]))


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("class_names",), "abc", r"'class_names' of it is 'abc'"),
        (("class_names",), [1], r"'class_names' of it is \[1\]"),
        (("mean",), ["x"], r"'mean' of it is \['x'\]"),
        (("version",), None, r"it has no 'version'"),
        (("version",), 4, r"its version is 4, and this version of sffx reads 2 and 3"),
        (("version",), True, r"'version' of it is True"),
        (("threshold",), "high", r"'threshold' of it is 'high'"),
        (("threshold",), -0.5, r"its threshold is -0\.5, not a number from 0 on"),
        (("threshold",), float("nan"), r"its threshold is nan"),
        (("inputs",), [], r"it lists no inputs or no stages"),
        (("stages",), [], r"it lists no inputs or no stages"),
        (("stages",), {}, r"'stages' of it is \{\}"),
        (("inputs", 0), "x", r"input 0 is a str, not an object"),
        (("inputs", 0, "shape"), None, r"input 0 has no 'shape'"),
        (("inputs", 0, "shape"), ["six"], r"'shape' of input 0 is \['six'\]"),
        (("inputs", 0, "dtype"), "load", r"'dtype' of input 0 is 'load'"),
        (("inputs", 0, "high"), 1.5, r"'high' of input 0 is 1\.5"),
        (("batched",), [1], r"'batched' holds 1, not a name"),
        (("axes",), [1], r"'axes' of it is \[1\]"),
        (("axes",), {"x": {"axis": 1, "rows": 1}}, r"the axis of 'x' has no 'slower'"),
        (("axes",), {"x": {"axis": 1, "rows": 3, "slower": 2}}, r"the axis of 'x' is "),
        (("stages", 1, "goodness"), None, r"stage 1 has no 'goodness'"),
        (("stages", 1, "sha256"), None, r"stage 1 has no 'sha256'"),
        (("stages", 1, "macs"), "15", r"'macs' of stage 1 is '15'"),
        (("stages", 1, "macs"), -15, r"'macs' of stage 1 is -15, not a number from 0 on"),
        (("stages", 1, "file"), "block_0.onnx", r"'block_0\.onnx' is the file of two stages"),
        (("stages", 1, "outputs"), ["block_0"], r"block_1 gives 'block_0', which is there before"),
        (("mean",), [float("nan")], r"mean is \(nan,\) and std is \(0\.25,\)\."),
        (("std",), [0.25, 0.25], r"mean is \(0\.5,\) and std is \(0\.25, 0\.25\)\."),
        (("std",), None, r"mean is \(0\.5,\) and std is None\."),
        (("stages", 1, "inputs"), [None], r"'inputs' of stage 1 holds None, not a name"),
        (("stages", 1, "inputs"), ["z"], r"block_1 reads 'z', which nothing before it gives"),
        (("stages", 0, "file"), "../block_0.onnx", r"'file' of stage 0 is '\.\./block_0\.onnx'"),
        (("stages", 0, "file"), "a\\b.onnx", r"'file' of stage 0 is .*not a name inside"),
        (("stages", 0, "file"), "..", r"'file' of stage 0 is '\.\.'"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(
    tmp_path: Path, place: tuple[str | int, ...], value: Any, problem: str
) -> None:
    write_manifest(tmp_path, MANIFEST)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), place, value)))
    with pytest.raises(
        sffx.InputError,
        match=rf"no early exit in '.*': manifest\.json is not the one of an early exit: {problem}.*"
        r"Hint: pass the folder that sffx\.export_early_exit wrote",
    ):
        sffx.EarlyExit.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "is not the one of an early exit: Expecting property name"),
        (b"\xff", "is not the one of an early exit: 'utf-8' codec"),
        (b"[]", "is not the one of an early exit: it is a list, not an object"),
        (b"[" * 100_000, "is not the one of an early exit: "),
    ],
)
def test_what_is_no_manifest_is_refused(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(sffx.InputError, match=rf"no early exit in .*: manifest\.json {problem}"):
        sffx.EarlyExit.load(tmp_path)


def digest_again(folder: Path) -> None:
    """Let the manifest have the digest of the first file as it is now."""
    file = folder / "manifest.json"
    new = digest((folder / "block_0.onnx").read_bytes())
    file.write_text(json.dumps(changed(json.loads(file.read_text()), ("stages", 0, "sha256"), new)))


def test_a_deployment_needs_no_onnx(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sffx.EarlyExit.load(folder)(torch.ones(2, 6)).scores
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    torch.testing.assert_close(sffx.EarlyExit.load(folder)(torch.ones(2, 6)).scores, expected)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "block_0.onnx").unlink()
    with pytest.raises(sffx.InputError, match=r"the file '.*block_0\.onnx' is missing\. Hint: "):
        sffx.EarlyExit.load(folder)


def test_a_broken_file_is_named(folder: Path) -> None:
    (folder / "block_0.onnx").write_bytes(b"half a file")
    with pytest.raises(
        sffx.InputError, match=r"block_0\.onnx' is not the file that manifest\.json"
    ):
        sffx.EarlyExit.load(folder)
    digest_again(folder)
    with pytest.raises(sffx.InputError, match=r"block_0\.onnx' is no ONNX file that can be used"):
        sffx.EarlyExit.load(folder)


def test_a_file_of_another_export_is_named(folder: Path) -> None:
    model = onnx.load(folder / "block_0.onnx")
    model.graph.output[0].name = "scores"
    model.graph.node[-1].output[0] = "scores"
    onnx.save(model, folder / "block_0.onnx")
    digest_again(folder)
    with pytest.raises(
        sffx.InputError,
        match=r"block_0\.onnx' has no output 'goodness_0', which manifest\.json names\. Hint: ",
    ):
        sffx.EarlyExit.load(folder)


def test_a_loader_never_mixes_two_exports(
    exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)]
    net = sffx.transform(nn.Sequential(*layers), "layer", torch.zeros(1, 6))
    newer = sffx.export_early_exit(net, tmp_path / "newer", 0.3)
    read = exit_files._content

    def replace_and_read(path: Path) -> bytes:
        if newer.exists():
            shutil.rmtree(folder)
            newer.rename(folder)
        return read(path)

    monkeypatch.setattr(exit_files, "_content", replace_and_read)
    loaded = sffx.EarlyExit.load(folder)
    assert loaded.threshold == 0.3
    x = torch.randn(4, 6)
    torch.testing.assert_close(loaded.cumulative(x), sffx.EarlyExit(net).cumulative(x))


def test_an_export_of_the_first_version_may_be_replaced(folder: Path) -> None:
    file = folder / "manifest.json"
    content = changed(json.loads(file.read_text()), ("stages", 0, "sha256"), None)
    file.write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(sffx.InputError, match="its version is 1"):
        sffx.EarlyExit.load(folder)
    exit_files.require_replaceable(folder)
    (folder / "other.bin").write_bytes(b"")
    with pytest.raises(sffx.InputError, match=r"something else than an early exit: other\.bin"):
        exit_files.require_replaceable(folder)


def test_names_of_other_classes_than_the_files_have_are_refused(folder: Path) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "class_names": ["a", "b"]}))
    with pytest.raises(sffx.InputError, match="names 2 classes, and the files give scores of 3"):
        sffx.EarlyExit.load(folder)


def test_an_input_of_another_type_is_told_the_type(exported: Path) -> None:
    with pytest.raises(sffx.InputError, match=r"Hint: it takes input \[.*, 6\] tensor\(float\)"):
        sffx.EarlyExit.load(exported)(np.zeros((2, 6)))
