"""The readout: what the cut model returns, from the goodness of its blocks and the logits of its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from sffx.errors import InputError

READOUTS = ("ensemble", "last", "classifier")


def require_readout(readout: str, known: Sequence[str] = READOUTS) -> None:
    """Raise an InputError if a readout is none of those known."""
    if readout not in known:
        raise InputError(f"there is no readout {readout!r}. Hint: the readouts are {', '.join(map(repr, known))}")


class Readout(nn.Module):
    """In train mode all that is trained, (K, B, J), the classifier's logits last; in eval mode scores, (B, J).

    Attributes:
        mode: what eval mode returns. "ensemble" is the mean of the blocks' goodness without the classifier (section 4.3), "last" the
            goodness of the last block, "classifier" the classifier's logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode = "ensemble"

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        require_readout(mode)
        self._mode = mode

    def forward(self, scores: list[Tensor]) -> Tensor:
        """Combine the goodness of each block, (B, J), and the classifier's logits, (B, J), the last entry."""
        if self.training:
            return torch.stack(scores)
        if self._mode == "classifier":
            return scores[-1]
        if self._mode == "last":
            return scores[-2]
        return torch.stack(scores[:-1]).mean(dim=0)

    def extra_repr(self) -> str:
        return f"mode={self._mode!r}"


class Cumulative(nn.Module):
    """The answer after each block: the mean of the goodness up to it, which after the last one is the ensemble (section 4.3)."""

    def forward(self, goodness: list[Tensor]) -> tuple[Tensor, ...]:
        """Return K means, (B, J) each, from the goodness of K blocks."""
        return tuple(total / depth for depth, total in enumerate(accumulate(goodness), start=1))
