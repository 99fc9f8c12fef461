"""The examples run, on handwritten digits, and leave what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: object, folder: Path) -> str:
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three digits as an ImageFolder: eight images each to train on and four to test on."""
    root = tmp_path_factory.mktemp("digits")
    found = load_digits(n_class=3)
    for i, (image, label) in enumerate(zip(found.images[:60], found.target[:60], strict=True)):
        part = root / ("train" if i % 3 else "test") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).convert("RGB").save(part / f"{i}.png")
    return root


def test_the_plain_loop_is_short():
    assert len((EXAMPLES / "train.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("script", ["train.py", "train_lightning.py"])
@pytest.mark.parametrize("method", ["bp", "sff", "cwc"])
def test_training_on_an_image_folder(script, method, folders, tmp_path):
    output = run(script, "--data", folders, "--method", method, "--epochs", 1, "--size", 32, "--batch", 8, folder=tmp_path)
    if script == "train.py":
        assert ("block_8" in output) == (method != "bp")
    assert "val" in output or "right" in output


def test_the_main_job_leaves_its_files_and_figures(tmp_path):
    output = run("digits.py", "--epochs", 1, "--out", tmp_path, folder=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["residual_network", "mobilenet_v3_small"]
    for name, found in results.items():
        accuracy = found["accuracy"]
        assert {"block_0", "ensemble", "last", "classifier"} <= set(accuracy["SFF"])
        assert accuracy["ONNX"] == pytest.approx(accuracy["SFF"]["ensemble"], abs=1e-6)
        assert found["costs"]["activations of a step, MiB"]["SFF"] < found["costs"]["activations of a step, MiB"]["BP"]
        assert f"accuracy of {name}" in output
        assert all((tmp_path / Path(file).name).stat().st_size > 0 for file in found["files"])
