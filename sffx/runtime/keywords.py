"""A cut model for trainers that pass a batch by keywords and take loss and logits back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from sffx.errors import InputError
from sffx.inputs import targets_of
from sffx.learning.losses import LossFunctions, check_targets, loss_functions
from sffx.learning.readouts import readout_of
from sffx.net import plan_of, require_uncompiled
from sffx.objective import require_single_view
from sffx.runtime.step import local_loss


class KeywordLoss(nn.Module):
    """A cut model that returns its loss and its logits, as `transformers.Trainer` expects them.

    `transformers.Trainer(model=KeywordLoss(net), args=TrainingArguments(...,
    remove_unused_columns=False))` trains the net block by block. Without that option the Trainer
    drops the inputs, since it cannot read their names from `forward`.

    Attributes:
        net: the cut model.
        loss_fn: the blocks' losses in train mode, as `sff_loss` takes them; cross-entropy if None.

    Raises:
        InputError: `net` is no cut model, was compiled as a whole or has an objective of several
            views, or `loss_fn` names other blocks.
    """

    # Tells the Trainer that the loss is a batch's mean, which it divides for accumulation.
    accepts_loss_kwargs = False

    def __init__(self, net: fx.GraphModule, loss_fn: LossFunctions | None = None) -> None:
        # Called for their errors only, which would come in the first step otherwise.
        plan = plan_of(net)
        require_single_view(plan.objective, "KeywordLoss")
        require_uncompiled(net)
        loss_functions(loss_fn, len(plan.all_blocks))
        super().__init__()
        self.net = net
        self.loss_fn = loss_fn

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse checkpointing, which `TrainingArguments(gradient_checkpointing=True)` asks for.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a block-local step frees the activations of each block, and checkpointing would free "
            "nothing more. Hint: gradient_checkpointing=False, or more blocks by another policy"
        )

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Return the logits of a batch, (B, J), and its loss where there are labels, a scalar.

        Args:
            labels: class indices, (B,), class probabilities, (B, J), or targets of another task.
            inputs: those of the model, by name.

        Returns:
            "loss" and "logits". In train mode the loss is `local_loss`. In eval mode it is the
            task's loss of the logits, for classes cross-entropy. The logits are the scores that
            `net.readout.mode` chooses.

        Raises:
            InputError: there are no inputs, no labels in train mode, they do not fit, or a loss is
                asked for of no samples.
        """
        if not inputs:
            raise InputError(
                "the batch holds labels only. "
                "Hint: TrainingArguments(remove_unused_columns=False) keeps the model's inputs"
            )
        if self.net.training:
            return self._train(inputs, labels)
        logits = self.net(**inputs)
        if labels is None:
            return {"logits": logits}
        plan = plan_of(self.net)
        check_targets(labels, len(logits), plan.num_classes, [None], plan.task)
        targets = targets_of(plan, inputs, labels)
        return {"loss": plan.task.loss(logits, targets), "logits": logits}

    def _train(self, inputs: dict[str, Any], labels: Tensor | None) -> dict[str, Tensor]:
        if labels is None:
            raise InputError(
                "labels are missing, which a training step needs. Hint: a batch with the key "
                "'labels', or eval mode"
            )
        scores: list[Tensor] = []

        def keep(name: str, own: Tensor, loss: Tensor) -> None:
            scores.append(own)

        loss = local_loss(self.net, inputs, labels, self.loss_fn, on_block=keep)
        readout = readout_of(self.net)
        logits = readout.read(scores, readout.mode)
        return {"loss": loss, "logits": logits}
