"""Channel-wise Competitive learning (CwC, AAAI 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sffx.blocks import Block, Input
from sffx.errors import InputError, shown
from sffx.learning.channelwise import CwCGoodness
from sffx.learning.objectives.choices import require_choice, require_positive
from sffx.learning.objectives.goodness import logistic_loss
from sffx.objective import Objective, Place
from sffx.parts import index_of
from sffx.tasks import CLASSIFICATION, Task

# The superclasses of a block: how many, the superclass of each class, or None for the classes.
Superclasses: TypeAlias = int | Sequence[int] | None


@dataclass(frozen=True)
class CwC(Objective):
    """The channels of a block are divided among the classes; each group's activity is a goodness.

    `G[n, j] = mean over the channels of group j and space of Y^2` (arXiv 2312.12668; sections 2.3.1
    and 2.3.2 of the SFF paper). G+ is the goodness of a sample's own class, and G- the mean over
    the other classes. The loss of a block is one of

    - "cwc", `-mean_n( G[n, y_n] - log sum_j exp G[n, j] )`: cross-entropy with G as logits;
    - "pvn", positive against negative: the mean of `softplus(theta - G+)` and
      `softplus(G- - theta)` over samples and both terms;
    - "cwg", both: `share * cwc + (1 - share) * pvn`.

    A block has no parameters beside the model's own. The classifier learns by cross-entropy: it is
    the softmax layer of the paper. The paper predicts by it, or by the goodness of the last block
    (the readout "last"). Its layers end with a BN, and no other norm stands between them:
    `transform(..., norm="none")`.

    A block with fewer channels than classes, or an early one, can tell superclasses apart. It then
    learns by the goodness of groups of channels for superclasses. At prediction each class has the
    goodness of its superclass, so such a block does not choose between the classes in it.

    Attributes:
        loss_form: "cwc", "pvn" or "cwg".
        threshold: theta of "pvn".
        share: of "cwc" in "cwg".
        superclasses: of the first blocks, in order; the blocks behind them learn classes. An entry
            is the superclass of each class, J indices that count from 0; the number of
            superclasses, which divides J: J / number neighbouring classes are one, as in the
            authors' code; or None, classes.
    """

    loss_form: Literal["cwc", "pvn", "cwg"] = "cwc"
    threshold: float = 2.0
    share: float = 0.28
    superclasses: Sequence[Superclasses] = ()

    name: ClassVar[str] = "cwc"

    def __post_init__(self) -> None:
        require_choice("loss_form", self.loss_form, ("cwc", "pvn", "cwg"))
        require_positive("threshold", self.threshold)
        require_positive("share", self.share)
        if self.share > 1:
            raise InputError(f"share is {self.share!r}. Hint: pass a number up to 1")
        # A record that was read from JSON has lists.
        object.__setattr__(self, "superclasses", _as_tuples(self.superclasses))

    @property
    def goodness(self) -> str | None:  # type: ignore[override]
        """The heads by name; with superclasses the heads are the objective's own."""
        return None if self.superclasses else "cwc"

    @property
    def _needs_indices(self) -> bool:
        return self.loss_form != "cwc" or bool(self.superclasses)

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        if not self._needs_indices:
            return
        if task != CLASSIFICATION:
            raise InputError(
                f"{self!r} learns classes of a sample, not sffx.tasks.{task!r}. "
                "Hint: objective='cwc' without options, or objective='sff'"
            )
        for entry in self.superclasses:
            _superclass_of_each(entry, num_classes)

    def require_blocks(self, blocks: int) -> None:
        if len(self.superclasses) >= blocks:
            raise InputError(
                f"superclasses has {len(self.superclasses)} entries for {blocks} blocks, but the "
                "last block must tell the classes apart. Hint: leave out its entry"
            )

    def check_targets(self, y: Any, batch: int, num_classes: int) -> None:
        if self._needs_indices:
            CLASSIFICATION.check_labels(y, batch, num_classes)

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        superclass_of = self._superclasses_at(index_of(block.target), num_classes)
        return CwCGoodness(block.channels, num_classes, block.channel_axis, superclass_of)

    def _superclasses_at(self, index: int, num_classes: int) -> list[int] | None:
        """Return the superclass of each class in a block, None where it learns classes."""
        if index >= len(self.superclasses):
            return None
        return _superclass_of_each(self.superclasses[index], num_classes)

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        superclass_of = self._superclasses_at(place.index, place.num_classes)
        if superclass_of is not None:
            scores, y = _of_superclasses(scores, y, superclass_of)
        if self.loss_form == "cwc":
            return place.task.loss(scores, y)
        separation = _positive_against_negative(scores, y, self.threshold)
        if self.loss_form == "pvn":
            return separation
        competition = place.task.loss(scores, y)
        return self.share * competition + (1 - self.share) * separation


def _positive_against_negative(scores: Tensor, y: Tensor, threshold: float) -> Tensor:
    """Return the loss "pvn" of a goodness (B, J)."""
    positive = scores.gather(1, y[:, None])[:, 0]
    negative = (scores.sum(1) - positive) / (scores.shape[1] - 1)
    return logistic_loss(positive - threshold, negative - threshold)


def _of_superclasses(
    scores: Tensor, y: Tensor, superclass_of: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the goodness of superclasses, (B, S), and the targets, given those of classes.

    All classes of a superclass have its goodness, so that of the first one is taken.
    """
    first_of = [superclass_of.index(each) for each in range(max(superclass_of) + 1)]
    targets = torch.tensor(superclass_of, device=y.device)[y]
    return scores[:, first_of], targets


def _superclass_of_each(entry: Superclasses, num_classes: int) -> list[int] | None:
    """Return the superclass of each class, None where a block learns classes.

    Raises:
        InputError: the entry does not fit the number of classes.
    """
    if entry is None:
        return None
    if isinstance(entry, int):
        if not 1 < entry <= num_classes or num_classes % entry:
            raise InputError(
                f"{entry} superclasses do not divide {num_classes} classes evenly. "
                "Hint: pass the superclass of each class, or another number from 2 on"
            )
        members = num_classes // entry
        return [label // members for label in range(num_classes)]
    if len(entry) != num_classes:
        raise InputError(
            f"superclasses are given for {len(entry)} classes, but there are {num_classes}. "
            "Hint: pass the superclass of each class"
        )
    found = set(entry)
    if len(found) < 2 or found != set(range(len(found))):
        raise InputError(
            f"the superclasses are {sorted(found)}. Hint: count them from 0 without a gap, "
            "and have two at the least"
        )
    return list(entry)


def _as_tuples(superclasses: Any) -> tuple[Superclasses, ...]:
    """Return entries of superclasses, which may be lists, as tuples.

    Raises:
        InputError: they are no entries.
    """
    hint = "Hint: pass a list with an entry for each of the first blocks, such as [20, 20, None]"
    if not isinstance(superclasses, Iterable) or isinstance(superclasses, (str, Tensor)):
        raise InputError(f"superclasses is {shown(superclasses)}. {hint}")
    entries: list[Superclasses] = []
    for entry in superclasses:
        if isinstance(entry, (list, tuple)) and all(_is_index(each) for each in entry):
            entries.append(tuple(entry))
        elif entry is None or _is_index(entry):
            entries.append(entry)
        else:
            raise InputError(f"an entry of superclasses is {shown(entry)}. {hint}")
    return tuple(entries)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
