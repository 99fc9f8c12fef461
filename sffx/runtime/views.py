"""What an objective makes of a batch: the input of a training step, and the blocks' losses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from sffx.blocks import BlockPlan
from sffx.errors import InputError
from sffx.inputs import bind
from sffx.learning.losses import LossFunction, LossFunctions
from sffx.learning.readouts import readout_of
from sffx.net import plan_of
from sffx.objective import DEFAULT, Batch, Objective, Place
from sffx.runtime.cut_values import CutValues
from sffx.runtime.evaluate import block_scores
from sffx.runtime.modes import evaluating


def training_input(net: fx.GraphModule, x: Any, y: Tensor) -> Any:
    """Return the input of a training step, with all views of the batch.

    Args:
        net: what `transform` returned.
        x: its input, as `sffx.inputs.bind` takes it, or values at a cut.
        y: targets, which were checked.
    """
    plan = plan_of(net)
    objective = plan.objective
    if not objective.makes_views:
        return x
    if isinstance(x, CutValues):
        return x.views_in_rows()
    batch = Batch(bind(plan, x), y, plan.num_classes, partial(_present_scores, net, x))
    with torch.no_grad():
        return dict(objective.training_views(batch))


@torch.no_grad()
def _present_scores(net: fx.GraphModule, x: Any) -> Tensor:
    """Return the scores that a net in train mode would give a batch in eval mode, (B, J)."""
    with evaluating(net):
        readout = readout_of(net)
        scores: Tensor = readout.read(block_scores(net, x), readout.mode)
        return scores


def losses_of(
    plan: BlockPlan, functions: Sequence[LossFunction | None]
) -> list[LossFunction | None]:
    """Return the loss of each block as a function of its scores and y, None for the task's.

    Args:
        plan: of the cut model.
        functions: the user's, None where the objective's own is wanted.
    """
    objective = plan.objective
    if objective == DEFAULT:
        return list(functions)
    losses: list[LossFunction | None] = []
    for index, given in enumerate(functions):
        place = Place(index, len(plan), plan.num_classes, plan.task)
        losses.append(given or _own_loss(objective, place))
    return losses


@cache
def _own_loss(objective: Objective, place: Place) -> LossFunction:
    """Return the loss of a block, the same function in each step: compiled code looks at that."""
    is_classifier = place.index == place.blocks
    own = objective.classifier_loss if is_classifier else objective.loss
    return partial(own, place=place)


def require_no_loss(objective: Objective, loss_fn: LossFunctions | None) -> None:
    """Raise an InputError if a loss is given to an objective whose scores are not of classes."""
    if loss_fn is not None and objective.goodness is None:
        raise InputError(
            f"loss_fn is given, but the objective {objective.name!r} has a loss of its own. "
            "Hint: leave it out, or override the loss in a class of your own (sffx.objective)"
        )
