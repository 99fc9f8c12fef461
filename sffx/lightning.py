"""Lightning modules that a Trainer trains as they are.

`SFFModule` trains a cut model block by block, `BPModule` a plain one by backpropagation, with the
same logs. The loss is an ordinary scalar. So gradient clipping, gradient accumulation, mixed
precision and DDP are the Trainer's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.checkpoint.entries import own_entries, with_plain_numbers
from sffx.errors import InputError, MissingExtra
from sffx.inputs import marks_tokens, targets_of
from sffx.learning.losses import LossFunctions, check_targets
from sffx.net import is_cut, plan_of
from sffx.plain import values_that_fit
from sffx.runtime.evaluate import block_scores, scores_by_name
from sffx.runtime.optimizers import BlockPlateau, parameter_groups, require_rate
from sffx.runtime.schedule import BlockSchedule
from sffx.runtime.step import local_loss
from sffx.tasks import CLASSIFICATION, Sums, Task
from sffx.tensors import shapes_of_floats

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as cause:
    raise MissingExtra("lightning", "lightning", "sffx.lightning") from cause

_SHORT = {"accuracy": "acc"}  # names of metrics in the log

# The entries of Lightning in which numbers of numpy may lie, as schedules compute them.
_WITH_NUMBERS = ("optimizer_states", "lr_schedulers", "hyper_parameters")

PLATEAU_KEY = "sffx_plateau"  # the entry of a checkpoint with the state of a `BlockPlateau`
SCHEDULE_KEY = "sffx_schedule"  # the entry of a checkpoint with the state of a `BlockSchedule`


class _Predictor(LightningModule):
    """What both modules share: AdamW over named groups, a plateau for each group, the metrics.

    Attributes:
        net: the model that is trained.
        task: what it predicts.
        answer: the name of the scores that are logged as "val_acc" and "val_loss". Others are
            logged as "val_acc/<name>".
        plateau: lowers the learning rate of each group by the validation loss of the scores that
            have the group's name.
    """

    answer: str
    task: Task = CLASSIFICATION

    def __init__(
        self, net: nn.Module, weight_decay: float, plateau: Mapping[str, Any] | None
    ) -> None:
        require_rate("weight_decay", weight_decay)
        if not isinstance(plateau, Mapping | None):
            raise InputError(
                f"plateau is {plateau!r}. Hint: options of sffx.BlockPlateau, {{'patience': 10}}"
            )
        super().__init__()
        self.net = net
        self.weight_decay = weight_decay
        self.plateau_options = plateau
        self.plateau: BlockPlateau | None = None
        self._saved_plateau: Mapping[str, Any] | None = None
        # Of the present epoch, by the name of the readout.
        self._sums: dict[str, Sums] = {}

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups, each with a name and a learning rate."""
        raise NotImplementedError

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """Return the training loss of a batch, a scalar."""
        raise NotImplementedError

    def scores(self, x: Any) -> dict[str, Tensor]:
        """Return the scores of a batch, (B, J), by the name of the readout."""
        raise NotImplementedError

    def learning(self) -> Collection[str] | None:
        """Return the names of the blocks that learn in the present epoch, None for all."""
        return None

    def task_of(self, x: Any, scores: Tensor) -> Task:
        """Return the task, with the options that depend on the shape of scores, (B, J, ...)."""
        return self.task

    def without_padding(self, x: Any, y: Tensor) -> Tensor:
        """Return targets that leave out the padding of an input."""
        return y

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

    def on_train_start(self) -> None:
        """Refuse a plateau that would never be stepped."""
        if self.plateau is None and self.plateau_options is not None:
            raise InputError(
                "plateau is given, but configure_optimizers of a subclass made none. Hint: "
                "self.plateau = sffx.BlockPlateau(optimizer, **self.plateau_options) there, or "
                "plateau=None"
            )
        if self.plateau is not None and not self.trainer.enable_validation:
            raise InputError(
                "plateau lowers learning rates by the validation loss, and there is no validation. "
                "Hint: trainer.fit(module, loader, val_loader), or plateau=None"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (x, y), which is logged as "train_loss"."""
        x, y = _pair(batch)
        loss = self.loss(x, y)
        self.log("train_loss", loss.detach(), batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy of every readout on a batch (x, y)."""
        self._log_scores("val", batch)

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of an epoch that was broken off."""
        self._sums.clear()

    def on_test_epoch_start(self) -> None:
        """Forget the sums of an epoch that was broken off."""
        self._sums.clear()

    def on_test_epoch_end(self) -> None:
        """Log the metrics that are no means over batches."""
        self._log_other_metrics("test")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log as in validation, under "test_acc" and "test_loss"."""
        self._log_scores("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the scores, (B, J), for a batch (x, y) or for x alone."""
        if isinstance(batch, (list, tuple)) and len(batch) == 1:
            # A TensorDataset of inputs alone.
            return self(batch[0])
        if isinstance(batch, (list, tuple)):
            x, _ = _pair(batch)
            return self(x)
        return self(batch)

    def on_validation_epoch_end(self) -> None:
        """Step the plateau and log the learning rates.

        Checkpoints are written after this, so they hold the learning rates of the next epoch.
        """
        self._log_other_metrics("val")
        # A validation outside of training, or before its first step, says nothing about an epoch.
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        if self.plateau is not None:
            metrics = self.trainer.callback_metrics
            losses = {}
            for name in self.plateau.schedulers:
                losses[name] = float(metrics[self._key("val_loss", name)])
            self.plateau.step(losses, self.learning())
        rates: dict[str, float] = {}
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                # Groups of an optimizer of one's own may have no names.
                name = group.get("name", f"group_{len(rates)}")
                rates[f"lr/{name}"] = group["lr"]
        self.log_dict(rates, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the entries that `sffx.load_checkpoint` reads, and the state of the plateau."""
        accuracy = {}
        for key, value in self.trainer.callback_metrics.items():
            # "val_acc/block_0", or "val_acc" for the answer.
            metric, _, name = key.partition("/")
            if metric == "val_acc":
                accuracy[name or self.answer] = float(value)
        checkpoint.update(own_entries(self.net, accuracy))
        for key in _WITH_NUMBERS:
            if key in checkpoint:
                checkpoint[key] = with_plain_numbers(checkpoint[key])
        if self.plateau is not None:
            checkpoint[PLATEAU_KEY] = with_plain_numbers(self.plateau.state_dict())

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
        y = self.without_padding(x, y)
        for name, scores in self.scores(x).items():
            task = self.task_of(x, scores)
            task.check_labels(y, len(scores), task.num_outputs(scores.shape))
            sums = task.sums(scores, y)
            count = int(sums["count"])
            metrics = {}
            for metric, source in task.means.items():
                # A batch may be all padding. Its sums are 0, and so are its means.
                mean = sums[source].float() / max(count, 1)
                metrics[self._metric_key(stage, metric, name)] = mean
            # The count makes the epoch's mean exact: the last batch may be smaller, and a batch in
            # which no position counts has no weight.
            is_answer = name == self.answer
            self.log_dict(metrics, batch_size=count, sync_dist=True, prog_bar=is_answer)
            self._add_sums(name, sums)

    def _add_sums(self, name: str, sums: Sums) -> None:
        """Keep the sums of metrics that are no means, until the epoch ends."""
        kept = self._sums.setdefault(name, {})
        for key, value in sums.items():
            added = value.double()
            kept[key] = kept[key] + added if key in kept else added

    def _log_other_metrics(self, stage: str) -> None:
        """Log at the end of an epoch the metrics that are no means over batches."""
        for name, sums in self._sums.items():
            # Over all processes.
            total = {}
            for key, value in sums.items():
                total[key] = self.trainer.strategy.reduce(value, reduce_op="sum")
            for metric, figure in self.task.metrics(total).items():
                if metric not in self.task.means:
                    self.log(self._metric_key(stage, metric, name), figure)
        self._sums.clear()

    def _metric_key(self, stage: str, metric: str, name: str) -> str:
        return self._key(f"{stage}_{_SHORT.get(metric, metric)}", name)

    def _key(self, metric: str, name: str) -> str:
        """Return the key of a metric in the log: "val_acc", or "val_acc/block_0"."""
        return metric if name == self.answer else f"{metric}/{name}"


class SFFModule(_Predictor):
    """A cut model that a Trainer trains block by block with AdamW.

    It logs

    - "train_loss";
    - "val_acc" and "val_loss" of the ensemble;
    - "val_acc/block_0", "val_loss/block_0" and so on of every block, of the last block ("last"), of
      the classifier, and of "weighted" where `sffx.weigh` weighed the blocks. For another task than
      classification, its metrics in the place of the accuracy, such as "val_mean_iou";
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
        schedule: the epochs in which each block learns; every block learns in every epoch if None.
            Checkpoints hold it, and a resumed run goes on by the one of its checkpoint. Train for
            `Trainer(max_epochs=schedule.epochs)`; with DDP by the strategy
            "ddp_find_unused_parameters_true".

    Raises:
        InputError: `net` is no cut model, or another argument cannot be used.
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
        schedule: BlockSchedule | None = None,
    ) -> None:
        plan = plan_of(net)  # raises if it is no cut model
        require_rate("lr", lr)
        require_rate("classifier_lr", lr if classifier_lr is None else classifier_lr)
        super().__init__(net, weight_decay, plateau)
        self.task = plan.task
        self.lr = lr
        self.classifier_lr = classifier_lr
        self.loss_fn = loss_fn
        self.schedule = None if schedule is None else _schedule_of(net, schedule)
        self.save_hyperparameters(ignore=["net", "loss_fn", "schedule"])

    def groups(self) -> list[dict[str, Any]]:
        """Return a parameter group for each block, as `sffx.parameter_groups` makes them."""
        return parameter_groups(self.net, self.lr, self.classifier_lr)

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """Return the local loss of a batch, which holds the activations of one block at a time."""
        return local_loss(self.net, x, y, self.loss_fn, blocks=self.learning())

    def learning(self) -> Collection[str] | None:
        """Return the names of the blocks that learn in the present epoch, None for all.

        Raises:
            InputError: the schedule has ended.
        """
        if self.schedule is None:
            return None
        return self.schedule.learning(self.current_epoch)

    def on_fit_start(self) -> None:
        """Raise an InputError if the Trainer has more epochs than the schedule."""
        planned = self.trainer.max_epochs
        if self.schedule is not None and planned is not None and planned > self.schedule.epochs:
            raise InputError(
                f"the Trainer has max_epochs={planned}, but the schedule has "
                f"{self.schedule.epochs} epochs. Hint: Trainer(max_epochs=schedule.epochs)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the schedule as well."""
        super().on_save_checkpoint(checkpoint)
        if self.schedule is not None:
            checkpoint[SCHEDULE_KEY] = self.schedule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the schedule from the checkpoint as well."""
        super().on_load_checkpoint(checkpoint)
        if SCHEDULE_KEY in checkpoint:
            self.schedule = BlockSchedule(self.net, checkpoint[SCHEDULE_KEY])

    def without_padding(self, x: Any, y: Tensor) -> Tensor:
        """Return targets that leave out the tokens that the net's attention mask marks."""
        return targets_of(plan_of(self.net), x, y)

    def scores(self, x: Any) -> dict[str, Tensor]:
        """Return the scores of each block and of each readout, (B, J)."""
        return scores_by_name(self.net, block_scores(self.net, x))


def _schedule_of(net: fx.GraphModule, schedule: Any) -> BlockSchedule:
    """Return a copy of a schedule; raise an InputError if it is none of the blocks of a net."""
    if not isinstance(schedule, BlockSchedule):
        raise InputError(
            f"schedule is {schedule!r}. Hint: pass a sffx.BlockSchedule, such as "
            "sffx.BlockSchedule.greedy(net, 5)"
        )
    return BlockSchedule(net, schedule.state_dict())


class BPModule(_Predictor):
    """A plain model that a Trainer trains by backpropagation with AdamW.

    It is the baseline for `SFFModule`. It logs "train_loss", "val_acc", "val_loss" and "lr/model".

    Args:
        net: a classifier that returns logits, (B, J), or a model with another task. They may be
            `.logits`, the entry "out" of a mapping, or the first of several outputs.
        lr: learning rate.
        weight_decay: of AdamW.
        plateau: options of torch's `ReduceLROnPlateau` (`factor`, `patience`, ...) for the
            validation loss. None keeps the learning rate.
        task: what the model predicts, one of `sffx.tasks`.

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
        task: Task = CLASSIFICATION,
    ) -> None:
        if is_cut(net):
            raise InputError(
                "net is a cut model. Hint: pass the model that it was cut from, or use SFFModule"
            )
        require_rate("lr", lr)
        super().__init__(net, weight_decay, plateau)
        self.task = task
        self.lr = lr
        self.save_hyperparameters(ignore=["net", "task"])

    def groups(self) -> list[dict[str, Any]]:
        """Return one parameter group, named "model"."""
        trained = [p for p in self.net.parameters() if p.requires_grad]
        return [{"params": trained, "lr": self.lr, "name": "model"}]

    def loss(self, x: Any, y: Tensor) -> Tensor:
        """Return the loss of a batch, that of the task."""
        logits = self._logits(x)
        task = self.task_of(x, logits)
        y = self.without_padding(x, y)
        check_targets(y, len(logits), task.num_outputs(logits.shape), [None], task)
        task.require_size(y, True, [logits.shape])
        return task.loss(logits, y)

    def task_of(self, x: Any, scores: Tensor) -> Task:
        """Return the task as the model's output has it: volumes have another space than images."""
        return self.task.settled(scores.shape, shapes_of_floats(x))

    def without_padding(self, x: Any, y: Tensor) -> Tensor:
        """Return targets that leave out the tokens that an input `attention_mask` marks.

        So loss and metrics count what those of `SFFModule` count.
        """
        name = "attention_mask"
        mask = _inputs_by_name(self.net, x).get(name)
        return self.task.without_padding(y, mask if marks_tokens(name, mask) else None)

    def scores(self, x: Any) -> dict[str, Tensor]:
        """Return the model's logits, (B, J)."""
        return {"model": self._logits(x)}

    def _logits(self, x: Any) -> Tensor:
        output = self(x)
        fitting = values_that_fit(output, self.task)
        shapes = [tuple(value.shape) for value in fitting]
        # Only a trace can tell which one most layers lead to.
        if len(shapes) > 1 and shapes.count(shapes[0]) > 1:
            raise InputError(
                f"the model returns {shapes.count(shapes[0])} values of shape {shapes[0]}, each of "
                "which could be its output. Hint: pass a wrapper whose forward returns one of them"
            )
        logits: Tensor = fitting[0] if fitting else output
        return logits


def _inputs_by_name(net: nn.Module, x: Any) -> Mapping[str, Any]:
    """Return the inputs of a model by the names of its arguments."""
    if isinstance(x, Mapping):
        return x
    inputs = x if isinstance(x, tuple) else (x,)
    names = inspect.signature(net.forward).parameters
    return dict(zip(names, inputs, strict=False))  # defaults have no input


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
