"""The example that trains over processes: interrupted and resumed in another number of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_pipeline.py"


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 5), ("val", 3)):
        for name in ("cats", "dogs"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(3, 32, 32, generator=generator)
                to_pil_image(pixels).save(folder / split / name / f"{i}.png")


def train(data: Path, out: Path, processes: int, epochs: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += [str(EXAMPLE), "--data", str(data), "--out", str(out), "--epochs", str(epochs)]
    command += ["--model", "mobilenet_v3_small", "--size", "32", "--batch", "4"]
    command += ["--dtype", "float64", "--workers", "0"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_resumed_in_another_number_of_processes_ends_the_same(tmp_path):
    write_images(tmp_path / "data")
    whole = tmp_path / "whole.pt"
    train(tmp_path / "data", whole, processes=1, epochs=2)
    resumed = tmp_path / "resumed.pt"
    train(tmp_path / "data", resumed, processes=3, epochs=1)
    shown = train(tmp_path / "data", resumed, processes=2, epochs=2)
    assert "epoch 2 of 2" in shown
    assert "epoch 1 of 2" not in shown
    expected = torch.load(whole, weights_only=True)["net"]
    found = torch.load(resumed, weights_only=True)["net"]
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
