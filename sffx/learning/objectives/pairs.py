"""Forward-Forward contrastive learning, improved (arXiv 2405.03432)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffx.blocks import Block, Input
from sffx.checks import positive_integer
from sffx.kernels.precision import full_precision, widened
from sffx.learning.norms import feature_norm
from sffx.learning.objectives.choices import require_choice
from sffx.learning.objectives.labels import OneTry, Repeated, repeated
from sffx.learning.objectives.probe import BlockProbe, require_classes
from sffx.learning.objectives.side_by_side import Call, require_two_nets
from sffx.learning.objectives.twin_layers import answer_alone, remove_twins, with_twins
from sffx.objective import Batch, Objective, Place
from sffx.tasks import CLASSIFICATION, Task

# Rows of a batch: one for each net.
NETS = 2


class PairHead(nn.Module):
    """A linear readout of the output of both nets, and their directions.

    Args:
        probe: the readout, which both nets share.
    """

    def __init__(self, probe: BlockProbe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits, and behind them the output at length 1.

        Args:
            y: the output of a block, (2 * B, ...), the second net's rows last.
            mask: (2 * B, T) where y is (2 * B, T, C), nonzero at real tokens.

        Returns:
            (2 * B, J + values) in train mode. In eval mode (B, J), the mean of both nets' logits.
        """
        with full_precision(y):
            wide = widened(y)
            logits = self.probe(wide, mask)
            if not self.training:
                return logits.reshape(NETS, -1, logits.shape[1]).mean(0)
            if mask is not None:
                wide = wide.masked_fill(~mask.bool()[:, :, None], 0)
            return torch.cat([logits, F.normalize(wide.flatten(1), dim=1)], dim=1)


@dataclass(frozen=True)
class FFCL(Objective):
    """Improved Forward-Forward contrastive learning (arXiv 2405.03432).

    Two nets of the same architecture, initialised differently, get the same batch. Each pair of
    blocks has one loss. With "cosine" this is the cosine embedding loss over all pairs of a sample
    n of the first net and a sample m of the second one: the mean of `1 - cos(a_n, b_m)` where both
    have the same label, and the mean of `max(0, cos(a_n, b_m))` where they have not, halved. With
    "bce" it is the binary cross-entropy of a linear readout that both nets share, against one-hot
    labels.

    With "cosine" a block has that readout as well, as a linear probe, from which the block gets no
    gradient. The score of a block is the mean of both nets' readouts. The classifiers of both nets
    learn by cross-entropy, and the first one answers.

    The publication gives no settings but 784-64-64-10 on MNIST, and no code. That pairs are told by
    their labels is from its predecessor (arXiv 2305.02927); that all pairs of a batch are taken is
    a choice of this package. `extract` returns the first net, and `sffx.LinearProbe` reads the
    features of the first net. Memory and time are those of two.

    Layers that do not learn are the same in both nets. A forward must call its layers, on values
    with the batch first. A model that does otherwise is refused, such as one with an embedding of
    positions, (T, C), that all samples share.

    Attributes:
        loss_form: "cosine" or "bce".
        regions: to which the readout pools images, along each axis of space.
    """

    loss_form: Literal["cosine", "bce"] = "cosine"
    regions: int = 2

    name: ClassVar[str] = "ffcl"
    goodness: ClassVar[str | None] = None
    norm: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        require_choice("loss_form", self.loss_form, ("cosine", "bce"))
        positive_integer("regions", self.regions)

    @property
    def views(self) -> int:
        return NETS

    def require(self, inputs: Sequence[Input], task: Task, num_classes: int) -> None:
        require_classes(self, task)

    def prepared(self, model: nn.Module) -> nn.Module:
        return with_twins(model, self.name)

    def require_prepared(self, model: nn.Module, call: Call, values: Mapping[str, Any]) -> None:
        require_two_nets(model, call, values, self.name)

    def finish(self, classifier: nn.Module) -> None:
        answer_alone(classifier)

    def restored(self, model: nn.Module) -> nn.Module:
        return remove_twins(model)

    def make_head(self, block: Block, num_classes: int) -> nn.Module:
        is_detached = self.loss_form == "cosine"
        norm = feature_norm(self.norm)
        return PairHead(BlockProbe(block, num_classes, self.regions, norm, is_detached))

    def head_shape(self, num_classes: int) -> None:
        return None

    def check_targets(self, y: Any, batch: int, num_classes: int) -> None:
        CLASSIFICATION.check_labels(y, batch, num_classes)

    def training_views(self, batch: Batch) -> Mapping[str, Any]:
        return batch.repeated(NETS)

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        logits = scores[:, : place.num_classes]
        if self.loss_form == "bce":
            targets = F.one_hot(y.repeat(NETS), place.num_classes).to(logits.dtype)
            return F.binary_cross_entropy_with_logits(logits, targets)
        first, second = scores[:, place.num_classes :].chunk(NETS)
        of_probe = place.task.loss(logits, y.repeat(NETS))
        return pair_loss(first @ second.t(), y) + of_probe

    def classifier_loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        return place.task.loss(scores, y.repeat(NETS))

    def tries(self, num_classes: int) -> int:
        return NETS

    def trials(self, inputs: Sequence[Input], num_classes: int) -> Mapping[str, nn.Module]:
        return {each.name: Repeated(NETS) for each in inputs}

    def choice(self, num_classes: int) -> nn.Module | None:
        # The rows of the first net.
        return OneTry(NETS, chosen=0)

    def feature_inputs(self, inputs: Mapping[str, Any], num_classes: int) -> Mapping[str, Any]:
        # The layers give the first rows to the first net.
        return {name: repeated(value, NETS) for name, value in inputs.items()}


def pair_loss(cosines: Tensor, y: Tensor) -> Tensor:
    """Return the cosine embedding loss of all pairs, a scalar.

    Args:
        cosines: of sample n of one net and m of the other, (B, B).
        y: labels, (B,).
    """
    is_same = (y[:, None] == y[None, :]).to(cosines.dtype)
    same = ((1 - cosines) * is_same).sum() / is_same.sum()
    others = 1 - is_same
    # A batch may hold one label only.
    other = (cosines.relu() * others).sum() / others.sum().clamp(min=1)
    return (same + other) / 2
