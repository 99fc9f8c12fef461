"""The training scripts run on a folder of images, by every method, and go on after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import sffx
from tests.examples.scripts import EXAMPLES, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three digits as an ImageFolder, two thirds of 60 images to train on and one third to test on."""
    root = tmp_path_factory.mktemp("digits")
    found = load_digits(n_class=3)
    for i, (image, label) in enumerate(zip(found.images[:60], found.target[:60], strict=True)):
        part = root / ("train" if i % 3 else "test") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).convert("RGB").save(part / f"{i}.png")
    return root


def arguments(folders: Path, method: str) -> list[object]:
    return ["--data", folders, "--method", method, "--size", 32, "--batch", 8]


def test_the_plain_loop_is_short() -> None:
    assert len((EXAMPLES / "train.py").read_text().splitlines()) <= 45


@pytest.mark.parametrize("method", ["bp", "sff", "cwc", "mlp"])
def test_the_plain_loop_runs(method: str, folders: Path, tmp_path: Path) -> None:
    output = run("train.py", *arguments(folders, method), "--epochs", 1, folder=tmp_path)
    assert "epoch 1 of 1" in output
    assert ("block_8" in output) == (method != "bp")
    assert "wrote run.pt" in output
    if method == "bp":
        return
    plan = sffx.transform(
        torchvision.models.resnet18(num_classes=3),
        goodness=method,
        example_input=torch.zeros(1, 3, 32, 32),
    ).plan
    checkpoint = sffx.load_checkpoint(tmp_path / "run.pt")
    assert checkpoint.cut == plan.record()
    assert f"{checkpoint.accuracy['ensemble']:.2%}" in output
    assert set(checkpoint.rates.values()) == {1e-3}


def test_lightning_goes_on_where_it_stopped(folders: Path, tmp_path: Path) -> None:
    options = [*arguments(folders, "sff"), "--workers", 0, "--out", tmp_path]
    run("train_lightning.py", *options, "--epochs", 1, folder=tmp_path)
    output = run("train_lightning.py", *options, "--epochs", 2, "--resume", folder=tmp_path)
    assert "validation accuracy" in output
    logs = sorted((tmp_path / "csv").glob("version_*/metrics.csv"))
    epochs = [{row.split(",")[0] for row in log.read_text().splitlines()[1:]} for log in logs]
    assert epochs == [{"0"}, {"1"}]
    assert (tmp_path / "training.png").exists()
    assert "holds a training already. Hint: --resume" in run(
        "train_lightning.py", *options, folder=tmp_path, fails=True
    )
    assert {"last.ckpt"} < {file.name for file in tmp_path.glob("*.ckpt")}


@pytest.mark.parametrize("script", ["train.py", "train_lightning.py"])
def test_parts_with_other_classes_are_refused(script: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test" / "0")
    message = run(script, "--data", tmp_path / "data", folder=tmp_path, fails=True)
    assert "differ in the folders {'0'}" in message
    assert "Traceback" not in message
