"""What the objectives with a label in the input have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sffx.blocks import Input
from sffx.checks import require_flag
from sffx.errors import InputError
from sffx.learning.objectives.choices import require_choice
from sffx.learning.objectives.labels import (
    LABEL_CODES,
    LabelCodes,
    LabelTrials,
    OneTry,
    Repeated,
    likely_other_labels,
    other_labels,
)
from sffx.objective import Batch, Objective, Place
from sffx.tasks import CLASSIFICATION, Task
from sffx.tasks.task import has_values


@dataclass(frozen=True)
class LabelledInput(Objective):
    """An objective that compares a sample with its label to the same one with a wrong label.

    A step runs each sample twice: with its label, the positive view, and with a wrong one, the
    negative view. A prediction runs a sample with every label and takes the one with the most
    goodness, over all blocks but the first. It also runs it with a neutral label, for the
    classifier.

    Attributes:
        labels: how a label is put into the first input: "pixels", its first J values; "waves", a
            wave over the whole image.
        negatives: how wrong labels are drawn: "uniform"; or "hard", by the scores that the net
            gives them, which costs a prediction in each step.
        neutral: whether a third view, with a neutral label, trains the model's own classifier.
            Otherwise the classifier stays as it is, and does not run in a step.
    """

    labels: Literal["pixels", "waves"] = "pixels"
    negatives: Literal["uniform", "hard"] = "uniform"
    neutral: bool = False

    goodness: ClassVar[str | None] = None
    norm: ClassVar[str] = "length"
    skips: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_choice("labels", self.labels, LABEL_CODES)
        require_choice("negatives", self.negatives, ("uniform", "hard"))
        require_flag("neutral", self.neutral)

    @property
    def views(self) -> int:
        return 3 if self.neutral else 2

    @property
    def trains_classifier(self) -> bool:
        return self.neutral

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        if task != CLASSIFICATION:
            raise InputError(
                f"the objective {self.name!r} learns classes of a sample, not sffx.tasks.{task!r}. "
                "Hint: objective='sff'"
            )
        first = inputs[0]
        if not first.is_float:
            raise InputError(
                f"the objective {self.name!r} puts labels into the input {first.name!r}, which "
                f"holds {first.dtype}, not floats. Hint: objective='sff'"
            )
        self._codes.require(first.shape, num_classes)

    def notes(self) -> tuple[str, ...]:
        if self.neutral:
            return ()
        return (
            f"the objective {self.name!r} leaves the classifier as it is; "
            f"sffx.objectives.{type(self).__name__}(neutral=True) trains it",
        )

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (1,)

    def check_targets(self, y: Any, batch: int, num_classes: int) -> None:
        CLASSIFICATION.check_labels(y, batch, num_classes)

    def training_views(self, batch: Batch) -> Mapping[str, Any]:
        name, x = next(iter(batch.inputs.items()))
        self._codes.require(x.shape[1:], batch.num_classes)
        self._require_seen(x, batch)
        codes = self._codes.codes(x.shape[1:], batch.num_classes).to(x.device, x.dtype)
        of_views = [codes[batch.y], codes[self._wrong_labels(batch)]]
        if self.neutral:
            of_views.append(codes[-1:].expand_as(of_views[0]))
        labelled = [self._codes.put(x, own) for own in of_views]
        return {**batch.repeated(self.views), name: torch.cat(labelled)}

    def _require_seen(self, x: Tensor, batch: Batch) -> None:
        """Raise an InputError if a label would lie in the padding of a sample, which nobody reads.

        Args:
            x: the first input, (B, T, ...).
            batch: with the mask of its tokens.
        """
        mask = batch.mask
        if mask is None or mask.shape != x.shape[:2] or not has_values(mask):
            return
        tokens = math.ceil(batch.num_classes / math.prod(x.shape[2:]))
        seen = mask[:, :tokens].bool().all(1)
        if not seen.all():
            raise InputError(
                f"the objective {self.name!r} puts a label into the first {tokens} tokens, which "
                f"are padding in {int((~seen).sum())} samples. Hint: pad at the end, and pass "
                f"{tokens} real tokens or more"
            )

    def _wrong_labels(self, batch: Batch) -> Tensor:
        if self.negatives == "hard":
            return likely_other_labels(batch.y, batch.scores())
        return other_labels(batch.y, batch.num_classes)

    def goodness_of_views(self, scores: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Return the goodness of the positive and of the negative view, (B,) each.

        Args:
            scores: what a head returned, (views * B, ...), the goodness in the first column.
            samples: B.
        """
        positive, negative, *_ = scores[:, 0].reshape(self.views, samples)
        return positive, negative

    def classifier_loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        neutral = scores.reshape(self.views, len(y), -1)[-1]
        return place.task.loss(neutral, y)

    def tries(self, num_classes: int) -> int:
        return num_classes + 1

    def trials(self, inputs: Sequence[Input], num_classes: int) -> Mapping[str, nn.Module]:
        first, *others = inputs
        modules: dict[str, nn.Module] = {}
        modules[first.name] = LabelTrials(self._codes, first.shape, num_classes)
        for other in others:
            modules[other.name] = Repeated(self.tries(num_classes))
        return modules

    def choice(self, num_classes: int) -> nn.Module | None:
        # The neutral label comes last.
        return OneTry(self.tries(num_classes), chosen=-1)

    def feature_inputs(self, inputs: Mapping[str, Any], num_classes: int) -> Mapping[str, Any]:
        name, x = next(iter(inputs.items()))
        neutral = self._codes.codes(x.shape[1:], num_classes)[-1:].to(x.device, x.dtype)
        return {**inputs, name: self._codes.put(x, neutral.expand(len(x), *neutral.shape[1:]))}

    @property
    def _codes(self) -> LabelCodes:
        return LABEL_CODES[self.labels]
