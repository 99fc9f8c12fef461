"""What an objective makes of a batch: the input of a training step, and the blocks' losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from sffx.blocks import BlockPlan
from sffx.errors import InputError
from sffx.inputs import batch_size, bind, explaining_input_errors, mask_among
from sffx.learning.losses import LossFunction, LossFunctions
from sffx.learning.readouts import readout_of
from sffx.net import plan_of
from sffx.objective import DEFAULT, Batch, Objective, Place
from sffx.runtime.cut_values import CutValues
from sffx.runtime.evaluate import block_scores
from sffx.runtime.modes import evaluating

# The losses of blocks that are kept: of many nets, and not of all there ever were.
_LOSSES = 4096


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
        _require_cached_views(objective, x)
        return x.views_in_rows()
    inputs = bind(plan, x)
    scores = partial(_present_scores, net, x)
    mask = mask_among(plan.inputs, [inputs[each.name] for each in plan.inputs])
    batch = Batch(inputs, y, plan.num_classes, scores, mask)
    place = f"the views of the objective {objective.name!r}"
    with torch.no_grad(), explaining_input_errors(net, inputs, place):
        made = objective.training_views(batch)
    _require_views(objective, made, inputs)
    return dict(made)


def _require_views(objective: Objective, made: Any, inputs: Mapping[str, Any]) -> None:
    """Raise an InputError if an objective made something else than the views of a batch.

    Args:
        objective: of a cut model.
        made: what its `training_views` returned.
        inputs: of the model by name, (B, ...).
    """
    what = f"training_views of the objective {objective.name!r} returned"
    if not isinstance(made, Mapping) or set(made) != set(inputs):
        is_mapping = isinstance(made, Mapping)
        found = f"a mapping of {list(made)}" if is_mapping else f"a {type(made).__name__}"
        raise InputError(
            f"{what} {found}. Hint: return a mapping with the inputs {', '.join(inputs)}, as "
            "batch.repeated(self.views) does"
        )
    samples = batch_size(inputs)
    rows = objective.views * samples
    for name, value in inputs.items():
        # A value without a batch axis may stay as it is.
        if not _has_rows(value, samples) or _has_rows(made[name], rows):
            continue
        shape = getattr(made[name], "shape", None)
        found = type(made[name]).__name__ if shape is None else f"shape {tuple(shape)}"
        raise InputError(
            f"{what} {name!r} of {found}, but {objective.views} views of {samples} samples are "
            f"{rows} rows. Hint: torch.cat of the views along axis 0; `views` of the class says "
            "how many there are"
        )


def _require_cached_views(objective: Objective, x: CutValues) -> None:
    """Raise an InputError if cached values do not hold the views of an objective."""
    for name, value in x.items():
        if value.ndim < 2 or value.shape[1] != objective.views:
            raise InputError(
                f"the cached {name} is {tuple(value.shape)}, but the objective "
                f"{objective.name!r} has {objective.views} views, (B, {objective.views}, ...). "
                "Hint: cache the outputs of this net, cache_outputs(net, ..., fixed_views=True)"
            )


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


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
        losses.append(given or _own_loss(_Same(objective), place))
    return losses


class _Same:
    """An objective as a key: equal to itself alone.

    One of the user's own may have no hash, or compare by its class alone.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.objective is self.objective

    def __hash__(self) -> int:
        return id(self.objective)


@lru_cache(maxsize=_LOSSES)
def _own_loss(same: _Same, place: Place) -> LossFunction:
    """Return the loss of a block, the same function in each step: compiled code looks at that."""
    objective = same.objective
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
