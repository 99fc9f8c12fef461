"""The contract of an objective: how the blocks of a cut model learn from a batch.

A *task* says what is predicted, a *schedule* who learns when, and an *objective* how a block
learns. It answers four questions:

1. Which passes go over a batch? `training_views` makes the input of a training step. Several
   *views* of a sample, such as a positive and a negative one, lie behind one another on the batch
   axis, so one walk over the blocks runs them all.
2. What does the head of a block give? `make_head` makes the head. In train mode it returns one row
   for each row of the input, and in eval mode scores (B, J).
3. What is the loss of a block? `loss`, and `classifier_loss` for the end of the model.
4. How do scores come about at prediction? `trials` puts modules in front of the first block, which
   may run a sample several times, and `skips` leaves blocks out of the ensemble. `feature_inputs`
   makes the input of which a `sffx.LinearProbe` reads features, and `probe_activation` what comes
   between a block's output and its features.

The methods of the base class are those of Scalable Forward-Forward: one view, the heads of
`goodness=`, the loss of the task. An objective of one's own overrides what differs:

    @dataclass(frozen=True)
    class Symmetric(Objective):
        name = "symmetric"
        views = 2

        def training_views(self, batch):
            return {name: torch.cat([x, x.flip(-1)]) for name, x in batch.inputs.items()}

        def loss(self, scores, y, place):
            return place.task.loss(scores, y.repeat(2))

        classifier_loss = loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.picklable import import_name
from sffx.tasks import Task

if TYPE_CHECKING:
    from sffx.blocks import Block, Input


@dataclass(frozen=True)
class Batch:
    """A batch, as an objective sees it before it makes the views.

    Attributes:
        inputs: of the model by name, tensors (B, ...).
        y: targets.
        num_classes: J.
        scores: returns the scores that the net gives the batch now, (B, J), without gradients. It
            costs a prediction.
        mask: the input that marks the real tokens, (B, T), None where there is none.
    """

    inputs: Mapping[str, Any]
    y: Tensor
    num_classes: int
    scores: Callable[[], Tensor]
    mask: Tensor | None = None

    def repeated(self, times: int) -> dict[str, Any]:
        """Return the inputs several times behind themselves, (times * B, ...), by name."""
        return {name: torch.cat([value] * times) for name, value in self.inputs.items()}


@dataclass(frozen=True)
class Place:
    """Where in the model a loss is computed.

    Attributes:
        index: of the block, 0 for the first one.
        blocks: the number of feature blocks.
        num_classes: J.
        task: of the model.
    """

    index: int
    blocks: int
    num_classes: int
    task: Task


@dataclass(frozen=True)
class Objective:
    """How the blocks of a cut model learn.

    Attributes:
        name: in records, tables and messages. Each class has its own.
        goodness: the default of `goodness=`; None for an objective whose heads are its own.
        norm: the default of `norm=`.
        skips: how many of the first blocks the ensemble leaves out.
    """

    name: ClassVar[str] = "sff"
    goodness: ClassVar[str | None] = "sff"
    norm: ClassVar[str] = "layer"
    skips: ClassVar[int] = 0

    @property
    def views(self) -> int:
        """The rows of a training step for each sample."""
        return 1

    @property
    def trains_classifier(self) -> bool:
        """Whether the classifier learns. If not, it does not run in a training step."""
        return True

    @property
    def makes_views(self) -> bool:
        """Whether a training step runs something else than the batch itself."""
        return type(self).training_views is not Objective.training_views

    @property
    def is_tried(self) -> bool:
        """Whether a prediction changes its inputs, or runs a sample several times."""
        return type(self).trials is not Objective.trials

    @property
    def in_words(self) -> str:
        """What the objective is called in pictures."""
        return self.name

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        """Raise an InputError if a model cannot learn by the objective.

        Args:
            inputs: of the model.
            task: of the model.
            num_classes: J.
        """

    def require_blocks(self, blocks: int) -> None:
        """Raise an InputError if options that are given for each block do not fit.

        Args:
            blocks: the number of feature blocks.
        """

    # The model.

    @property
    def changes_model(self) -> bool:
        """Whether another model is cut than the one that was passed."""
        return type(self).prepared is not Objective.prepared

    def prepared(self, model: nn.Module) -> nn.Module:
        """Return the model that is cut; a copy, where it is another one.

        Raises:
            InputError: the model cannot be changed as the objective needs it.
        """
        return model

    def require_prepared(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Mapping[str, Any]], Any],
        values: Mapping[str, Any],
    ) -> None:
        """Raise an InputError if a model that `prepared` changed is not what it should be.

        Args:
            model: that `prepared` returned. It stays as it is.
            call: calls a model with its inputs, which are given by name.
            values: random inputs by name, (B, ...).
        """

    def finish(self, classifier: nn.Module) -> None:
        """Change the classifier of a cut model, where it is known which part of a model that is."""

    def restored(self, model: nn.Module) -> nn.Module:
        """Return the model as it was passed, of one that `prepared` returned. It may be altered."""
        return model

    def notes(self) -> tuple[str, ...]:
        """Return remarks for the plan, one sentence each."""
        return ()

    def record(self) -> dict[str, Any]:
        """Return the objective as its name and its options, for a checkpoint.

        Options are numbers and strings, and lists and mappings of these. A tensor becomes a list,
        and of any other object there is the name: of a function its own, or that of its class.
        """
        options = {entry.name: _recorded(getattr(self, entry.name)) for entry in fields(self)}
        return {"name": self.name, **options}

    # Training.

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        """Return the head of a block, where `goodness` is None.

        Args:
            block: whose output it reads.
            num_classes: J.
        """
        raise NotImplementedError

    def head_shape(self, num_classes: int) -> tuple[int, ...] | None:
        """Return the shape of what a head returns in train mode for one row.

        None if it depends on the block.
        """
        return (num_classes,)

    def check_targets(self, y: Any, batch: int, num_classes: int) -> None:
        """Raise an InputError if y is no target; the task has checked it already."""

    def training_views(self, batch: Batch) -> Mapping[str, Any]:
        """Return the inputs of a training step by name, (views * B, ...).

        Row `v * B + n` is view v of sample n.
        """
        return batch.inputs

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        """Return the loss of a feature block, a scalar.

        Args:
            scores: what the head returned in train mode, (views * B, ...), in float32 or wider.
            y: targets of the B samples.
            place: of the block.
        """
        return place.task.loss(scores, y)

    def classifier_loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        """Return the loss of the classifier, a scalar.

        Args:
            scores: its logits, (views * B, J).
            y: targets of the B samples.
            place: of the classifier.
        """
        return place.task.loss(scores, y)

    # Prediction.

    def tries(self, num_classes: int) -> int:
        """Return how many rows a prediction runs for each sample."""
        return 1

    def trials(self, inputs: Sequence[Input], num_classes: int) -> Mapping[str, nn.Module]:
        """Return the modules through which the inputs go first, by the input's name.

        In eval mode such a module makes (tries * B, ...) of (B, ...). In train mode it returns what
        it is given, since the views are made before.
        """
        return {}

    def choice(self, num_classes: int) -> nn.Module | None:
        """Return the module that chooses the rows for the classifier, None for all of them."""
        return None

    def feature_inputs(self, inputs: Mapping[str, Any], num_classes: int) -> Mapping[str, Any]:
        """Return the inputs by name of which features are read, (B, ...).

        There may be further rows behind these, whose features are not read. The modules of `trials`
        do not run.

        Args:
            inputs: of the model by name, (B, ...).
            num_classes: J.
        """
        return inputs

    def probe_activation(self) -> nn.Module | None:
        """Return what a linear probe applies to a block's output before it pools, None for nothing.

        The module gets (N, C, ...), and returns the same shape.
        """
        return None


def _recorded(option: Any) -> Any:
    """Return an option as it stands in a record, which must be read without running code."""
    if option is None or isinstance(option, (bool, str)):
        return option
    # A number of NumPy is no number to a loader that runs no code.
    if isinstance(option, Integral):
        return int(option)
    if isinstance(option, Real):
        return float(option)
    if isinstance(option, (Tensor, np.ndarray)):
        return option.tolist()
    if isinstance(option, (list, tuple)):
        entries = [_recorded(entry) for entry in option]
        return tuple(entries) if isinstance(option, tuple) else entries
    if isinstance(option, Mapping):
        return {key: _recorded(value) for key, value in option.items()}
    return import_name(option)


@dataclass(frozen=True)
class SFF(Objective):
    """Scalable Forward-Forward (arXiv 2501.03176, sections 4.2 and 4.3), the default.

    A block's loss is that of the task with the goodness as scores: for classes
    `-mean_n( g[n, y_n] - log sum_j exp g[n, j] )`. The prediction is the mean of the blocks'
    goodness.
    """


DEFAULT = SFF()


def require_single_view(objective: Objective, what: str) -> None:
    """Raise an InputError if training or prediction changes the inputs.

    Args:
        objective: of a cut model.
        what: cannot do that: "a pipeline".
    """
    if objective.views > 1 or objective.is_tried:
        raise _many_runs(objective, what)


def require_single_try(objective: Objective, num_classes: int, what: str) -> None:
    """Raise an InputError if a prediction runs a sample several times.

    Args:
        objective: of a cut model.
        num_classes: J.
        what: cannot do that: "an early exit".
    """
    if objective.tries(num_classes) > 1:
        raise _many_runs(objective, what)


def _many_runs(objective: Objective, what: str) -> InputError:
    return InputError(
        f"the objective {objective.name!r} runs each sample several times, which {what} "
        "cannot do. Hint: objective='sff' or 'cwc'"
    )
