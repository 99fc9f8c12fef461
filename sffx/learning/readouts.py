"""The readout chooses what a cut model returns: the goodness of its blocks or the logits.

Each readout is a function in the dict `READOUTS`. The cut model, evaluation, logs and exports use
the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from sffx.errors import InputError
from sffx.parts import READOUT
from sffx.tasks import CLASSIFICATION, Task

# The goodness of K blocks, (B, J) each, and as the last entry the classifier's logits, (B, J). For
# another task than classification they have the shapes of its scores (`sffx.tasks`).
Scores: TypeAlias = Sequence[Tensor] | Tensor
# Weights of the blocks, which sum to 1; None where the blocks were not weighed.
Weights: TypeAlias = Sequence[float] | None


def ensemble(
    scores: Scores, weights: Weights = None, task: Task = CLASSIFICATION, skips: int = 0
) -> Tensor:
    """Return the mean of the blocks' goodness, without the classifier (section 4.3)."""
    return mean_goodness(_voting(task.aligned(scores)[:-1], skips))


def last(
    scores: Scores, weights: Weights = None, task: Task = CLASSIFICATION, skips: int = 0
) -> Tensor:
    """Return the goodness of the last block."""
    return task.aligned(scores[-2:])[0]


def classifier(
    scores: Scores, weights: Weights = None, task: Task = CLASSIFICATION, skips: int = 0
) -> Tensor:
    """Return the classifier's logits."""
    return scores[-1]


def weighted(
    scores: Scores, weights: Weights = None, task: Task = CLASSIFICATION, skips: int = 0
) -> Tensor:
    """Return the mixture of the blocks by their weights.

    Raises:
        InputError: there are no weights, or not one for each block.
    """
    goodness = task.aligned(scores)[:-1]
    known = require_weights(weights)
    if len(known) != len(goodness):
        raise InputError(
            f"there are {len(known)} weights, but {len(goodness)} blocks. "
            "Hint: sffx.weigh(net, loader) finds them"
        )
    return task.mixture(goodness, known)


def cumulative(
    scores: Scores, weights: Weights = None, task: Task = CLASSIFICATION, skips: int = 0
) -> tuple[Tensor, ...]:
    """Return the answer after each block, K tensors (B, J): the mean of the goodness up to it.

    The last one is the ensemble. Blocks that it leaves out have no answer.
    """
    sums = accumulate(_voting(task.aligned(scores)[:-1], skips))
    return tuple(total / depth for depth, total in enumerate(sums, start=1))


def _voting(goodness: Scores, skips: int) -> Scores:
    """Return the goodness of the blocks that the ensemble counts: the last one, at the least."""
    return goodness[min(skips, len(goodness) - 1) :]


# Each function takes the scores, the weights of the blocks, which only "weighted" uses, the task,
# and how many of the first blocks the ensemble leaves out (`Objective.skips`). It must not look at
# values: to trace it, an exporter passes proxies in the place of tensors.
READOUTS: dict[str, Callable[..., Any]] = {
    "ensemble": ensemble,
    "weighted": weighted,
    "last": last,
    "classifier": classifier,
    "cumulative": cumulative,
}

WEIGHTED: Final = "weighted"

# By how much the sum of weights in float64 may differ from 1.
_ROUNDING = 1e-9

# The readouts that return one score for each class, (B, J): what a cut model can return.
MODES = ("ensemble", "weighted", "last", "classifier")

# The same names for type checkers and editors.
Mode: TypeAlias = Literal["ensemble", "weighted", "last", "classifier"]
ReadoutName: TypeAlias = Literal[Mode, "cumulative"]


def every_mode(
    scores: Scores, weights: Weights = None, task: Task = CLASSIFICATION, skips: int = 0
) -> dict[str, Tensor]:
    """Return the scores of each readout in `MODES`, (B, J), "weighted" only where weights exist."""
    by_mode: dict[str, Tensor] = {}
    for mode in MODES:
        if mode != WEIGHTED or weights is not None:
            by_mode[mode] = READOUTS[mode](scores, weights, task, skips)
    return by_mode


def mean_goodness(goodness: Scores) -> Tensor:
    """Return the mean of the goodness of some blocks, (B, J), from one tensor (B, J) for each."""
    return torch.stack(tuple(goodness)).mean(dim=0)


def require_readout(readout: str, known: Sequence[str] = MODES) -> None:
    """Raise an InputError if a readout is none of those known."""
    if readout not in known:
        names = ", ".join(map(repr, known))
        raise InputError(f"there is no readout {readout!r}. Hint: the readouts are {names}")


def require_weights(weights: Weights) -> Sequence[float]:
    """Return the weights of the blocks.

    Raises:
        InputError: there are none.
    """
    if weights is None:
        raise InputError(
            "the blocks have no weights yet. Hint: sffx.weigh(net, loader) finds them, "
            "with samples not trained on"
        )
    return weights


def _checked_weights(weights: Any) -> Tensor:
    """Return the weights of a state dict; raise an InputError if they are none."""
    is_vector = isinstance(weights, Tensor) and weights.ndim == 1 and not weights.is_complex()
    if not is_vector or not (weights >= 0).all() or not weights.sum() > 0:
        raise InputError(
            f"the state dict has {weights!r} as weights of the blocks. "
            "Hint: a tensor of one number for each block, as sffx.weigh found them"
        )
    return weights


class Readout(nn.Module):
    """The last module of a cut model.

    In train mode it returns all scores that are trained, (K + 1, B, J), with the classifier's
    logits last; for another task than classification, a tuple of them. In eval mode it returns the
    scores, (B, J), of the readout that `mode` names.

    Attributes:
        task: of the model.
        skips: how many of the first blocks the ensemble leaves out.
        mode: a name in `MODES`, the readout of eval mode.
        weights: K numbers that sum to 1, or None where the blocks were not weighed. Once they are
            set, they are part of the state dict. Loading them turns the mode "ensemble" into
            "weighted".
    """

    # Those of a readout that was pickled before there were other tasks and objectives.
    task: Task = CLASSIFICATION
    skips: int = 0

    def __init__(self, task: Task = CLASSIFICATION, skips: int = 0) -> None:
        super().__init__()
        self.task = task
        self.skips = skips
        self._mode = "ensemble"
        self.weights: tuple[float, ...] | None = None

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        require_readout(mode)
        if mode == WEIGHTED:
            require_weights(self.weights)
        self._mode = mode

    def forward(self, scores: list[Tensor]) -> Any:
        """Return what training needs, or the scores of the present mode.

        Args:
            scores: the goodness of each block, (B, J), and the classifier's logits, (B, J), last.
        """
        if self.training:
            return self.task.gathered(scores)
        return self.read(scores, self._mode)

    def read(self, scores: Any, readout: str) -> Any:
        """Return what a readout makes of scores.

        Args:
            scores: of all blocks, tensors or the proxies of an exporter.
            readout: a name in `READOUTS`.
        """
        return READOUTS[readout](scores, self.weights, self.task, self.skips)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weights is not None:
            destination[f"{prefix}weights"] = torch.tensor(self.weights, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over the weights of a state dict, and the mode that goes with them.

        The state dict of a model whose blocks were not weighed has none, and the weights are
        forgotten. A part of a state, for `strict=False`, leaves them as they are.
        """
        # The readout is the last child of a net, so what the net lacks was noted before.
        of_net = prefix.removesuffix(f"{READOUT}.")
        is_part = any(name.startswith(of_net) for name in missing_keys)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        key = f"{prefix}weights"
        if key in state_dict:
            given = _checked_weights(state_dict[key]).double()
            total = given.sum().item()
            # Weights that this class has saved come back to the bit.
            if abs(total - 1) > _ROUNDING:
                given = given / total
            self.weights = tuple(given.tolist())
            if self._mode == "ensemble":
                self._mode = WEIGHTED
        elif is_part:
            if self.weights is not None:
                missing_keys.append(key)
        else:
            self.weights = None
            if self._mode == WEIGHTED:
                self._mode = "ensemble"
        # The weights are no buffer, so torch has noted their key as unexpected. The caller reads
        # this very list, so the key is removed in place.
        if key in unexpected_keys:
            unexpected_keys.remove(key)

    def extra_repr(self) -> str:
        return f"mode={self._mode!r}"


def readout_of(net: nn.Module) -> Readout:
    """Return the readout of a cut model."""
    readout = net.get_submodule(READOUT)
    assert isinstance(readout, Readout)  # every cut model has one
    return readout
