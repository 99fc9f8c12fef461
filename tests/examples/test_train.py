"""The training scripts: every method runs, and an interrupted run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import sffx
from tests.examples.scripts import run, start


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 60 images of three digits as an ImageFolder: 40 to train on and 20 to test on."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits(n_class=3)
    for i, (image, label) in enumerate(zip(digits.images[:60], digits.target[:60], strict=True)):
        part = root / ("train" if i % 3 else "test") / str(label)
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).convert("RGB").save(part / f"{i}.png")
    return root


def arguments(folders: Path, method: str) -> list[object]:
    # A small model: a resnet18 would write 130 MB after each epoch.
    model = ["--model", "squeezenet1_1", "--size", 32, "--batch", 8]
    return ["--data", folders, "--method", method, *model, "--workers", 0]


@pytest.mark.parametrize("method", ["bp", "sff", "cwc", "mlp"])
def test_the_plain_loop_trains_and_saves(method: str, folders: Path, tmp_path: Path) -> None:
    output = run("train.py", *arguments(folders, method), "--epochs", 1, folder=tmp_path)
    assert "epoch 1 of 1: training loss" in output
    assert "wrote run.pt" in output
    assert ("block_8" in output) == (method != "bp")
    checkpoint = sffx.load_checkpoint(tmp_path / "run.pt")
    answer = "model" if method == "bp" else "ensemble"
    assert f"{checkpoint.accuracy[answer]:.2%} of the held-out images right" in output
    if method == "bp":
        assert checkpoint.cut is None
        return
    model = torchvision.models.squeezenet1_1(num_classes=3)
    example = torch.zeros(1, 3, 32, 32)
    assert checkpoint.cut == sffx.plan(model, "residual", example, goodness=method).record()
    assert set(checkpoint.rates.values()) == {1e-3}


def killed_after_an_epoch(*arguments: object, folder: Path) -> None:
    """Run train.py and kill it, without warning, as soon as the first epoch is saved."""
    with start("train.py", *arguments, folder=folder) as process:
        for line in process.stdout:
            if line.startswith("epoch 1 of"):
                break
        process.kill()
    assert process.returncode != 0


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(folders: Path, tmp_path: Path) -> None:
    # This model has dropout, so the random state matters as well as the order of the samples.
    model = ["--model", "mobilenet_v3_small", "--policy", "stages(2)", "--epochs", 3]
    command = [*arguments(folders, "sff"), *model]
    run("train.py", *command, "--out", "whole.pt", folder=tmp_path)
    killed_after_an_epoch(*command, "--out", "half.pt", folder=tmp_path)
    assert sffx.load_checkpoint(tmp_path / "half.pt").more["epoch"] < 3
    run("train.py", *command, "--out", "half.pt", "--resume", folder=tmp_path)

    whole = sffx.load_checkpoint(tmp_path / "whole.pt")
    resumed = sffx.load_checkpoint(tmp_path / "half.pt")
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed.state, whole.state, **exactly)
    torch.testing.assert_close(resumed.optimizer["state"], whole.optimizer["state"], **exactly)
    assert resumed.optimizer["param_groups"] == whole.optimizer["param_groups"]
    assert (resumed.accuracy, resumed.more) == (whole.accuracy, whole.more)


def test_runs_that_cannot_go_on_are_refused(folders: Path, tmp_path: Path) -> None:
    def error(*more: object) -> str:
        return run("train.py", *arguments(folders, "bp"), *more, folder=tmp_path, fails=True)

    assert "nothing to resume: run.pt does not exist" in error("--resume")
    settings = {"method": "bp", "model": "squeezenet1_1", "policy": "residual"}
    settings = {**settings, "size": 32, "batch": 8, "lr": 0.5, "seed": 3}
    sffx.save_checkpoint(tmp_path / "run.pt", torch.nn.Linear(1, 1), epoch=9, settings=settings)
    assert "run.pt holds a training already. Hint: --resume" in error()
    assert "trained with --lr 0.5 --seed 3. Hint: resume with it" in error("--resume")
    assert "run.pt has 9 epochs already. Hint: --epochs 19" in error(
        *("--resume", "--lr", 0.5, "--seed", 3, "--epochs", 9)
    )


def test_lightning_goes_on_where_it_stopped(folders: Path, tmp_path: Path) -> None:
    options = [*arguments(folders, "sff"), "--out", tmp_path]
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
    assert "trained with --lr 0.001. Hint: resume with it" in run(
        "train_lightning.py", *options, "--resume", "--lr", 0.1, folder=tmp_path, fails=True
    )


@pytest.mark.parametrize("script", ["train.py", "train_lightning.py"])
def test_parts_with_other_classes_are_refused(script: str, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test" / "0")
    message = run(script, "--data", tmp_path / "data", folder=tmp_path, fails=True)
    assert "differ in the folders {'0'}" in message
    assert "Traceback" not in message
