"""The example that trains over processes: interrupted and resumed in another number of them."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchvision.transforms.functional import to_pil_image

from tests.examples import shorter
from tests.processes import spawn

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
    """Run the example over processes, as torchrun does, and return what they printed."""
    # The store is here, as torchrun has it, so that no port need be guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = ["--data", str(data), "--out", str(out), "--epochs", str(epochs)]
    arguments += ["--model", "mobilenet_v3_small", "--size", "32", "--batch", "4"]
    arguments += ["--dtype", "float64", "--workers", "0"]
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    spawn(run_example, processes, processes, store.port, arguments, log)
    return log.read_text()


def run_example(rank: int, processes: int, port: int, arguments: list[str], log: Path) -> None:
    """Run the example in a process that torchrun would have started."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(processes),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    sys.argv = [str(EXAMPLE), *arguments]
    shorter.use(pytest.MonkeyPatch())
    with log.open("a", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    # Python's own end is left out, see `tests.processes.leave`.
    os._exit(0)


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
