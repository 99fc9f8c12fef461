"""Lightning modules that a Trainer trains as they are.

`SFFModule` trains a cut model block by block, `BPModule` a plain one by backpropagation, with the
same logs. The loss is an ordinary scalar. So gradient clipping, gradient accumulation, mixed
precision and DDP are the Trainer's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sffx.checkpoint.entries import own_entries
from sffx.errors import InputError, MissingExtra
from sffx.learning.losses import LossFunctions, check_labels
from sffx.net import is_cut, plan_of
from sffx.runtime.evaluate import block_scores, scores_by_name
from sffx.runtime.optimizers import BlockPlateau, parameter_groups
from sffx.runtime.step import local_loss

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as cause:
    raise MissingExtra("lightning", "lightning", "sffx.lightning") from cause

PLATEAU_KEY = "sffx_plateau"  # the entry of a checkpoint with the state of a `BlockPlateau`


class _Classifier(LightningModule):
    """What both modules share: AdamW over named groups, a plateau for each group, the metrics.

    Attributes:
        net: the model that is trained.
        answer: the name of the scores that are logged as "val_acc" and "val_loss". Others are
            logged as "val_acc/<name>".
        plateau: lowers the learning rate of each group by the validation loss of the scores that
            have the group's name.
    """

    answer: str

    def __init__(
        self, net: nn.Module, weight_decay: float, plateau: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.net = net
        self.weight_decay = weight_decay
        self.plateau_options = plateau
        self.plateau: BlockPlateau | None = None
        self._saved_plateau: Mapping[str, Any] | None = None

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups, each with a name and a learning rate."""
        raise NotImplementedError

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """Return the training loss of a batch, a scalar."""
        raise NotImplementedError

    def scores(self, x: Any) -> dict[str, Tensor]:
        """Return the scores of a batch, (B, J), by the name of the readout."""
        raise NotImplementedError

    def forward(self, x: Any) -> Tensor:
        """Return the output of the model; in eval mode these are scores, (B, J)."""
        if isinstance(x, Mapping):
            return self.net(**x)
        if isinstance(x, tuple):
            return self.net(*x)
        return self.net(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the groups."""
        optimizer = torch.optim.AdamW(self.groups(), weight_decay=self.weight_decay)
        if self.plateau_options is not None:
            self.plateau = BlockPlateau(optimizer, **self.plateau_options)
            self._restore_plateau()
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (x, y), which is logged as "train_loss"."""
        x, y = _pair(batch)
        loss = self.loss(x, y)
        self.log("train_loss", loss.detach(), batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of every readout on a batch (x, y)."""
        self._log_scores("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log as in validation, under "test_acc" and "test_loss"."""
        self._log_scores("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the scores, (B, J), for a batch (x, y) or for x alone."""
        if isinstance(batch, (list, tuple)):
            x, _ = _pair(batch)
            return self(x)
        return self(batch)

    def on_validation_epoch_end(self) -> None:
        """Step the plateau and log the learning rates.

        Checkpoints are written after this, so they hold the learning rates of the next epoch.
        """
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        if self.plateau is not None:
            metrics = self.trainer.callback_metrics
            names = self.plateau.schedulers
            losses = {name: float(metrics[self._key("val_loss", name)]) for name in names}
            self.plateau.step(losses)
        rates = {}
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                rates[f"lr/{group['name']}"] = group["lr"]
        self.log_dict(rates, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the entries that `sffx.load_checkpoint` reads, and the state of the plateau."""
        accuracy = {}
        for key, value in self.trainer.callback_metrics.items():
            metric, _, name = key.partition("/")
            if metric == "val_acc":
                accuracy[name or self.answer] = float(value)
        checkpoint.update(own_entries(self.net, accuracy))
        if self.plateau is not None:
            checkpoint[PLATEAU_KEY] = self.plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the state of the plateau from the checkpoint."""
        self._saved_plateau = checkpoint.get(PLATEAU_KEY)
        self._restore_plateau()

    def _restore_plateau(self) -> None:
        """Restore the plateau as soon as there are both a plateau and a saved state.

        Lightning may load the checkpoint before it asks for the optimizer, or after.
        """
        if self.plateau is None or self._saved_plateau is None:
            return
        self.plateau.load_state_dict(self._saved_plateau)
        self._saved_plateau = None

    def _log_scores(self, stage: str, batch: Any) -> None:
        x, y = _pair(batch)
        for name, scores in self.scores(x).items():
            check_labels(y, *scores.shape)
            metrics = {
                self._key(f"{stage}_loss", name): F.cross_entropy(scores, y),
                self._key(f"{stage}_acc", name): (scores.argmax(dim=1) == y).float().mean(),
            }
            # The batch size makes the epoch's mean exact where the last batch is smaller.
            is_answer = name == self.answer
            self.log_dict(metrics, batch_size=len(y), sync_dist=True, prog_bar=is_answer)

    def _key(self, metric: str, name: str) -> str:
        return metric if name == self.answer else f"{metric}/{name}"


class SFFModule(_Classifier):
    """A cut model that a Trainer trains block by block with AdamW.

    It logs

    - "train_loss";
    - "val_acc" and "val_loss" of the ensemble;
    - "val_acc/block_0", "val_loss/block_0" and so on of every block, of the last block ("last"), of
      the classifier, and of "weighted" where `sffx.weigh` weighed the blocks;
    - "lr/block_0" and so on.

    `sffx.load_checkpoint`, `sffx-viz` and `sffx-export` read its checkpoints.
    `sffx.plots.results.plot_training` draws the log of a CSVLogger.

    Args:
        net: what `sffx.transform` returned.
        lr: learning rate of the feature blocks and their heads.
        classifier_lr: learning rate of the classifier, `lr` if None.
        weight_decay: of AdamW.
        plateau: options of `sffx.BlockPlateau` (`factor`, `patience`, ...), by which each block's
            own validation loss lowers that block's learning rate. None keeps the learning rates.
        loss_fn: the blocks' training losses, as `sffx.sff_loss` takes them; cross-entropy if None.

    Raises:
        InputError: `net` is no cut model.
    """

    answer = "ensemble"
    net: fx.GraphModule

    def __init__(
        self,
        net: fx.GraphModule,
        lr: float = 1e-3,
        classifier_lr: float | None = None,
        weight_decay: float = 0.01,
        plateau: Mapping[str, Any] | None = None,
        loss_fn: LossFunctions | None = None,
    ) -> None:
        plan_of(net)  # raises if it is no cut model
        super().__init__(net, weight_decay, plateau)
        self.lr = lr
        self.classifier_lr = classifier_lr
        self.loss_fn = loss_fn
        self.save_hyperparameters(ignore=["net", "loss_fn"])

    def groups(self) -> list[dict[str, Any]]:
        """Return a parameter group for each block, as `sffx.parameter_groups` makes them."""
        return parameter_groups(self.net, self.lr, self.classifier_lr)

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """Return the local loss of a batch, which holds the activations of one block at a time."""
        return local_loss(self.net, x, y, self.loss_fn)

    def scores(self, x: Any) -> dict[str, Tensor]:
        """Return the scores of each block and of each readout, (B, J)."""
        return scores_by_name(self.net, block_scores(self.net, x))


class BPModule(_Classifier):
    """A plain classifier that a Trainer trains by backpropagation with AdamW.

    It is the baseline for `SFFModule`. It logs "train_loss", "val_acc", "val_loss" and "lr/model".

    Args:
        net: a classifier that returns logits, (B, J), or holds them as `.logits`.
        lr: learning rate.
        weight_decay: of AdamW.
        plateau: options of torch's `ReduceLROnPlateau` (`factor`, `patience`, ...) for the
            validation loss. None keeps the learning rate.

    Raises:
        InputError: `net` is a cut model.
    """

    answer = "model"

    def __init__(
        self,
        net: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        plateau: Mapping[str, Any] | None = None,
    ) -> None:
        if is_cut(net):
            raise InputError(
                "net is a cut model. Hint: pass the model that it was cut from, or use SFFModule"
            )
        super().__init__(net, weight_decay, plateau)
        self.lr = lr
        self.save_hyperparameters(ignore=["net"])

    def groups(self) -> list[dict[str, Any]]:
        """Return one parameter group, named "model"."""
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return [{"params": trained, "lr": self.lr, "name": "model"}]

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """Return the cross-entropy of a batch."""
        return F.cross_entropy(self._logits(x), y)

    def scores(self, x: Any) -> dict[str, Tensor]:
        """Return the model's logits, (B, J)."""
        return {"model": self._logits(x)}

    def _logits(self, x: Any) -> Tensor:
        output = self(x)
        return getattr(output, "logits", output)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    """Return the input and the labels of a batch.

    Raises:
        InputError: the batch is no pair (x, y).
    """
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        raise InputError(
            f"the loader yielded a {type(batch).__name__}, not a pair (x, y). "
            "Hint: wrap the data set so that it gives pairs"
        )
    x, y = batch
    # Lightning's collate makes a list of several inputs; the model takes a tuple.
    return (tuple(x) if isinstance(x, list) else x), y
