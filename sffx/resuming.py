"""Pieces for a Lightning Trainer whose interrupted runs end as if they had not been interrupted.

seeds = EpochSeeds(seed=0)
loader = DataLoader(data, batch_size=64, sampler=seeds.shuffled(data))
best = BestCheckpoint("runs", "best-{epoch}", monitor="val_acc", mode="max")
newest = ModelCheckpoint("runs", "last", enable_version_counter=False)
trainer = Trainer(callbacks=[seeds, best, newest], plugins=[WholeFiles()])
trainer.fit(module, loader, ckpt_path="runs/last.ckpt")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import RandomSampler

from sffx.errors import MissingExtra
from sffx.files import writing

try:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
except ImportError as cause:
    raise MissingExtra("lightning", "lightning", "sffx.resuming") from cause


class EpochSeeds(Callback):
    """Makes the randomness of an epoch depend on a seed and the epoch's number alone.

    Checkpoints of Lightning hold no random state. A resumed run would begin with the seed again:
    it would see the order of the first epoch once more, and drop other activations. Random changes
    of images that worker processes of a loader make are not covered.

    Resume from a checkpoint of the end of an epoch. In the middle of one, Lightning takes the first
    batches of the epoch once more, and warns of it.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._trainer: Trainer | None = None

    def shuffled(self, data: Sized) -> ShuffledByEpoch:
        """Return a sampler that shuffles a data set in another way in each epoch."""
        return ShuffledByEpoch(data, self._seed_of_epoch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer, which knows the epoch even before the epoch begins."""
        self._trainer = trainer

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the random state of the process before the first step of an epoch."""
        # Not at the start of the epoch: where it goes on after a checkpoint, Lightning asks the
        # loader for its batches before that, elsewhere after it, and a loader draws a number.
        if batch_idx:
            return
        # Dropout must not drop the same in each process.
        seed_everything(self._seed_of_epoch() + trainer.global_rank, verbose=False)

    def _seed_of_epoch(self) -> int:
        epoch = 0 if self._trainer is None else self._trainer.current_epoch
        # Far apart, so that the processes of one epoch do not have the seeds of the next one.
        return (self.seed + 1_000_003 * epoch) % 2**32


class ShuffledByEpoch(RandomSampler):
    """Yields the indices of a data set in an order that depends on a seed alone.

    In several processes, Lightning puts a sampler of its own in the place of this one.
    """

    def __init__(self, data_source: Sized, seed_of_epoch: Callable[[], int]) -> None:
        super().__init__(data_source)
        self._seed_of_epoch = seed_of_epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed_of_epoch())
        yield from torch.randperm(len(self), generator=generator).tolist()


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints that are whole or not there, wherever temporary files lie.

    Lightning writes to the folder of temporary files first. From another file system, the finished
    file is copied, and a kill during the copy leaves half of it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; addresses such as s3://... are left to Lightning."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as draft, draft.open("wb") as file:
            torch.save(checkpoint, file)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint, and names one that exists after the run was killed and resumed.

    A better checkpoint replaces the older one before the last checkpoint is written. After a kill
    between the two, the last checkpoint names a file that is gone. The better one is there.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, and look for the best file in the folder if the named one is gone."""
        super().load_state_dict(state_dict)
        if not self.best_model_path or Path(self.best_model_path).exists():
            return
        gone = self.best_model_path
        found = self._scores_beside(Path(gone))
        # As Lightning has it before there is a best file.
        self.best_model_score = None
        self.best_model_path = self.kth_best_model_path = ""
        self.best_k_models = {}
        if not found:
            rank_zero_warn(
                f"the best checkpoint {gone!r} is gone, and no file beside it holds its score. The "
                "best of the epochs from here on is kept, even if it is worse. Hint: "
                "save_weights_only=True leaves out the score"
            )
            return
        choose = max if self.mode == "max" else min
        path = choose(found, key=lambda each: float(found[each]))
        self.best_model_path = self.kth_best_model_path = path
        self.best_model_score = self.kth_value = found[path]
        self.best_k_models = {path: found[path]}

    def _scores_beside(self, gone: Path) -> dict[str, torch.Tensor]:
        """Return the scores of the best files that this callback wrote, by their paths.

        Args:
            gone: the file that was the best. A name such as "best/{epoch}" puts it into a folder
                inside that of the callback.
        """
        scores = {}
        folders = dict.fromkeys([Path(str(self.dirpath)), gone.parent])
        files = [path for folder in folders for path in sorted(folder.glob("*.ckpt"))]
        for path in files:
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                own = checkpoint["callbacks"][self.state_key]
            except Exception:
                continue  # a file of someone else, or one that a kill has left in part
            if Path(own.get("best_model_path", "")).name == path.name:
                scores[str(path)] = own["best_model_score"]
        return scores
