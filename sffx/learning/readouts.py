"""The readout: what the cut model returns, from the goodness of its blocks and the logits of its classifier."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from sffx.errors import InputError

READOUTS = ("ensemble", "last", "classifier")
WEIGHTED = "weighted"  # of models whose blocks were weighed


def require_readout(readout: str, known: Sequence[str] = READOUTS) -> None:
    """Raise an InputError if a readout is none of those known."""
    if readout not in known:
        raise InputError(
            f"there is no readout {readout!r}. Hint: the readouts are {', '.join(map(repr, known))}"
        )


class Readout(nn.Module):
    """In train mode all that is trained, (K, B, J), the classifier's logits last; in eval mode scores, (B, J).

    Attributes:
        mode: what eval mode returns. "ensemble" is the mean of the blocks' goodness without the classifier (section 4.3), "last" the
            goodness of the last block, "classifier" the classifier's logits, "weighted" the `mixture` of the blocks by `weights`.
        weights: K numbers that sum to 1, or None where the blocks were not weighed. They are part of the state dict once they are there,
            and who loads them gets the mode "weighted".
    """

    weights: tuple[float, ...] | None = (
        None  # of the class, for nets that were pickled before there were any
    )

    def __init__(self) -> None:
        super().__init__()
        self._mode = "ensemble"

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        require_readout(mode, (*READOUTS, WEIGHTED))
        if mode == WEIGHTED:
            self.require_weights()
        self._mode = mode

    def require_weights(self) -> tuple[float, ...]:
        """Return the weights.

        Raises:
            InputError: there are none.
        """
        if self.weights is None:
            raise InputError(
                "the blocks have no weights yet. Hint: sffx.weigh(net, loader) finds them, with samples not trained on"
            )
        return self.weights

    def forward(self, scores: list[Tensor]) -> Tensor:
        """Combine the goodness of each block, (B, J), and the classifier's logits, (B, J), the last entry."""
        if self.training:
            return torch.stack(scores)
        if self._mode == "classifier":
            return scores[-1]
        if self._mode == "last":
            return scores[-2]
        goodness = torch.stack(scores[:-1])
        if self._mode == WEIGHTED:
            weights = self.require_weights()
            if len(weights) != len(goodness):
                raise InputError(
                    f"there are {len(weights)} weights, but {len(goodness)} blocks. Hint: sffx.weigh(net, loader) finds them"
                )
            return mixture(goodness, weights)
        return goodness.mean(dim=0)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weights is not None:
            destination[f"{prefix}weights"] = torch.tensor(self.weights, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the weights of a state dict, which a model that was not weighed has none of, and the mode that goes with them."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        *_, unexpected, _ = args
        key = f"{prefix}weights"
        if key in state_dict:
            found = state_dict[key].double()
            self.weights = tuple((found / found.sum()).tolist())
            self._mode = WEIGHTED if self._mode == "ensemble" else self._mode
        else:
            self.weights = None
            self._mode = "ensemble" if self._mode == WEIGHTED else self._mode
        unexpected[:] = [name for name in unexpected if name != key]

    def extra_repr(self) -> str:
        return f"mode={self._mode!r}"


def readout_of(net: nn.Module) -> Readout:
    """Return the readout of a cut model."""
    readout = net.get_submodule("readout")
    assert isinstance(readout, Readout)  # every cut model has one
    return readout


def mixture(goodness: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the logarithm of the weighted mean of the blocks' softmax, (B, J), from goodness (K, B, J) and K weights that sum to 1.

    What a block without weight says makes no difference, not even nan.
    """
    kept = [i for i, weight in enumerate(weights) if weight > 0]
    shares = goodness.new_tensor([weights[i] for i in kept])
    return torch.logsumexp(goodness[kept].log_softmax(2) + shares.log()[:, None, None], dim=0)


class Cumulative(nn.Module):
    """The answer after each block: the mean of the goodness up to it, which after the last one is the ensemble (section 4.3)."""

    def forward(self, goodness: list[Tensor]) -> tuple[Tensor, ...]:
        """Return K means, (B, J) each, from the goodness of K blocks."""
        return tuple(total / depth for depth, total in enumerate(accumulate(goodness), start=1))
