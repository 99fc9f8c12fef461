"""A schedule with a Trainer: as a plain loop, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import sffx

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sffx.lightning import SFFModule

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
EPOCHS = [(0, 1), (0, 2), (1, 4)]

pytestmark = pytest.mark.filterwarnings("ignore")


def cut() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    return sffx.transform(nn.Sequential(*layers, nn.Linear(8, 3)), "layer", X).train()


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def fit(
    folder: Path, epochs: int, path: Path | None = None, schedule: Any = None, **options: Any
) -> tuple[SFFModule, Path]:
    net = cut()
    module = SFFModule(net, lr=0.05, schedule=schedule, **options)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, "last", enable_version_counter=False)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    return module, folder / "last.ckpt"


def by_a_plain_loop() -> dict[str, Tensor]:
    net = cut()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 0.05), weight_decay=0.01)
    for epoch in range(4):
        names = ["block_0", "block_1", "classifier"]
        learning = [
            n for n, (first, end) in zip(names, EPOCHS, strict=True) if first <= epoch < end
        ]
        for x, y in loader():
            optimizer.zero_grad()
            sffx.local_loss(net, x, y, blocks=learning).backward()
            optimizer.step()
    return net.state_dict()


def test_a_trainer_trains_by_a_schedule_and_an_interrupted_one_too(tmp_path: Path) -> None:
    schedule = sffx.BlockSchedule(cut(), EPOCHS)
    module, _ = fit(tmp_path / "whole", schedule.epochs, schedule=schedule)
    for key, value in by_a_plain_loop().items():
        assert torch.equal(module.net.state_dict()[key], value), key
    _, path = fit(tmp_path / "parts", 3, schedule=schedule)
    # The schedule of the checkpoint is the one that counts.
    resumed, path = fit(tmp_path / "parts", 4, path)
    assert resumed.schedule == schedule
    assert sffx.load_checkpoint(path).more["sffx_schedule"] == schedule.state_dict()
    torch.testing.assert_close(resumed.net.state_dict(), module.net.state_dict(), rtol=0, atol=0)


def test_the_plateau_leaves_frozen_blocks_alone(tmp_path: Path) -> None:
    schedule = sffx.BlockSchedule.greedy(cut(), 1)
    # No loss is lower than the one before by so much.
    options = {"patience": 0, "threshold": 1e6, "threshold_mode": "abs", "factor": 0.5}
    module, _ = fit(tmp_path, 2, schedule=schedule, plateau=options)
    rates = {group["name"]: group["lr"] for group in module.optimizers().param_groups}
    # The first loss of a block is the lowest so far.
    assert rates == {"block_0": 0.05, "block_1": 0.05, "classifier": 0.05}
    steps = {name: each.last_epoch for name, each in module.plateau.schedulers.items()}
    assert steps == {"block_0": 1, "block_1": 1, "classifier": 0}


def test_a_trainer_with_more_epochs_than_the_schedule_is_refused(tmp_path: Path) -> None:
    schedule = sffx.BlockSchedule.all_at_once(cut(), 2)
    with pytest.raises(sffx.InputError, match="max_epochs=3, but the schedule has 2 epochs"):
        fit(tmp_path, 3, schedule=schedule)


@pytest.mark.parametrize("schedule", [3, EPOCHS])
def test_what_is_no_schedule_of_the_net_is_refused(schedule: Any) -> None:
    with pytest.raises(sffx.InputError, match=r"schedule is .*Hint: pass a sffx.BlockSchedule"):
        SFFModule(cut(), schedule=schedule)


def test_a_schedule_of_another_net_is_refused() -> None:
    other = sffx.transform(nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))), "layer", X)
    schedule = sffx.BlockSchedule.greedy(other, 1)
    with pytest.raises(sffx.InputError, match="the schedule names 'block_2', 'block_3'"):
        SFFModule(cut(), schedule=schedule)
