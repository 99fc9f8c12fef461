"""The main job, cut short, leaves its files and its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from examples import digits
from tests.examples import shorter
from tests.examples.scripts import run_main


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a part of the images and of the layers, and time few steps."""
    shorter.use(monkeypatch)
    source = load_digits()
    few = Bunch(images=source.images[:320], target=source.target[:320])
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    monkeypatch.setattr(digits, "TEST_IMAGES", 100)
    compare_time = digits.compare_time
    monkeypatch.setattr(
        digits, "compare_time", lambda steps, **_: compare_time(steps, rounds=2, warmup=1)
    )


@pytest.mark.usefixtures("short")
def test_the_main_job_leaves_its_files_and_figures(tmp_path: Path) -> None:
    output = run_main(digits.main, "--epochs", 1, "--out", tmp_path / "demo", folder=tmp_path)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results) == ["residual_network", "mobilenet_v3_small"]
    for name, found in results.items():
        accuracy, costs = found["accuracy"], found["costs"]
        assert {"block_0", "ensemble", "last", "classifier"} <= set(accuracy["SFF"])
        assert accuracy["ONNX"] == accuracy["SFF"]["ensemble"]
        assert 0 <= accuracy["BP"] <= 1
        for measure in ("peak memory of a step, MiB", "activations of a step, MiB"):
            assert costs[measure]["SFF / BP"] == pytest.approx(
                costs[measure]["SFF"] / costs[measure]["BP"]
            )
            assert costs[measure]["SFF / BP"] < 1
        assert costs["time of a step, ms"]["SFF / BP"] > 0
        assert f"accuracy of {name}" in output
        assert f"{accuracy['SFF']['ensemble']:.2%}" in output
    left = {file.name for file in (tmp_path / "demo").iterdir() if file.stat().st_size}
    assert left == {
        "results.json",
        *(file for found in results.values() for file in found["files"]),
    }
    assert {f"{name}.onnx" for name in results} | {
        f"{name}-accuracy.png" for name in results
    } <= left
