"""An interrupted run of Lightning ends as one that was not interrupted, and loses no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sffx

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from sffx.lightning import SFFModule
from sffx.resuming import BestCheckpoint, EpochSeeds, WholeFiles

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorded(TensorDataset):
    """Notes which samples were loaded."""

    def __init__(self) -> None:
        super().__init__(X, Y)
        self.loaded: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.loaded.append(index)
        return super().__getitem__(index)


def fit(folder: Path, epochs: int, resume: bool = False) -> tuple[list[int], Trainer]:
    """Train a model with dropout, and return the order of the samples, and the trainer."""
    seed_everything(3, verbose=False)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU()]
    net = sffx.transform(nn.Sequential(*layers, nn.Linear(8, 3)), "layer", X)
    data = Recorded()
    seeds = EpochSeeds(3)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[
            seeds,
            BestCheckpoint(folder, "best-{epoch}", monitor="val_acc", mode="max"),
            ModelCheckpoint(folder, "last", enable_version_counter=False),
        ],
        plugins=[WholeFiles()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        SFFModule(net, lr=0.05),
        DataLoader(data, batch_size=8, sampler=seeds.shuffled(data)),
        DataLoader(TensorDataset(X, Y), batch_size=8),
        ckpt_path=str(folder / "last.ckpt") if resume else None,
    )
    return data.loaded, trainer


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", 4)
    first, _ = fit(tmp_path / "parts", 2)
    rest, _ = fit(tmp_path / "parts", 4, resume=True)
    assert first + rest == whole
    epochs = [tuple(whole[i : i + 24]) for i in range(0, 96, 24)]
    assert len(set(epochs)) == 4
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    expected = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    resumed = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(resumed["state_dict"], expected["state_dict"], **exactly)
    of_adamw = resumed["optimizer_states"][0]
    of_the_whole_run = expected["optimizer_states"][0]
    torch.testing.assert_close(of_adamw["state"], of_the_whole_run["state"], **exactly)
    assert of_adamw["param_groups"] == of_the_whole_run["param_groups"]


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("folder", [".", "inside"])
def test_a_best_checkpoint_that_is_gone_is_not_named(
    tmp_path: Path, mode: str, folder: str, recwarn: Any, *, left: bool
) -> None:
    def callback() -> BestCheckpoint:
        return BestCheckpoint(tmp_path, f"{folder}/best-{{epoch}}", monitor="val_acc", mode=mode)

    older = callback()
    (tmp_path / folder).mkdir(exist_ok=True)
    older.best_model_path = str(tmp_path / folder / "best-epoch=1.ckpt")
    older.best_model_score = torch.tensor(0.5)
    older.best_k_models = {older.best_model_path: older.best_model_score}
    state = older.state_dict()
    better = str(tmp_path / folder / "best-epoch=2.ckpt")
    if left:
        own = {**state, "best_model_path": better, "best_model_score": torch.tensor(0.75)}
        torch.save({"callbacks": {older.state_key: own}}, better)
    # Files of someone else, of which the second one holds a Python object.
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    torch.save({"callbacks": {older.state_key: tmp_path}}, tmp_path / "b.ckpt")
    torch.save([1, 2], tmp_path / "c.ckpt")
    # The last checkpoint holds a state of the callback as well, but it is not its file.
    torch.save({"callbacks": {older.state_key: state}}, tmp_path / "last.ckpt")
    resumed = callback()
    resumed.load_state_dict(state)
    if left:
        assert resumed.best_model_path == better
        assert resumed.best_model_score == 0.75
        assert resumed.best_k_models == {better: torch.tensor(0.75)}
    else:
        assert resumed.best_model_path == ""
        assert resumed.best_model_score is None
    said = [str(each.message) for each in recwarn if "is gone" in str(each.message)]
    assert len(said) == (0 if left else 1)


def test_a_best_checkpoint_that_is_there_stays_the_best(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    _, trainer = fit(tmp_path, 3, resume=True)
    best = trainer.checkpoint_callbacks[0]
    assert isinstance(best, BestCheckpoint)
    assert Path(best.best_model_path).exists()
    assert len(list(tmp_path.glob("best*"))) == 1


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "new" / "last.ckpt"
    WholeFiles().save_checkpoint({"epoch": 1}, path)

    def half(content: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        WholeFiles().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
