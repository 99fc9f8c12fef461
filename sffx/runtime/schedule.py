"""Who learns when: the epochs in which each block of a cut model learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from torch import fx

from sffx.checks import is_integer, is_number, positive_integer
from sffx.errors import InputError, shown
from sffx.runtime.learn import learning_stages

# The epochs of a block: a range, or its first epoch and the epoch before which it stops.
Epochs: TypeAlias = range | Sequence[int]


class BlockSchedule:
    """The epochs in which each block learns. Outside of them it is frozen.

    This is interleaved layer training (ILT) of arXiv 2312.12668, and of section 2.3.4 of the SFF
    paper. A frozen block runs in eval mode and without gradients where a later block learns, and
    otherwise not at all. So its weights and its running statistics stay.

        schedule = sffx.BlockSchedule(net, [(0, 2), (0, 3), (0, 4), (0, 5), (0, 20)])
        for epoch in range(schedule.epochs):
            for x, y in loader:
                sffx.local_step(net, x, y, optimizer, blocks=schedule.learning(epoch))

    It does not change during a run. So an interrupted run goes on from the number of its epoch.

    Args:
        net: what `transform` returned.
        epochs: of each block by its name; a block that is not named never learns. Or of all blocks
            in order, the classifier last, where the objective trains it. A pair (first, end) means
            `range(first, end)`: the block learns in epoch `first`, and in epoch `end` no longer.

    Raises:
        InputError: `net` is no cut model, a name is not that of a block which learns, there are not
            as many entries as blocks, an entry is no range of epochs, or in some epoch before the
            last one nobody learns.
    """

    def __init__(
        self, net: fx.GraphModule, epochs: Mapping[str, Epochs] | Sequence[Epochs]
    ) -> None:
        self._names = _names(net)
        self._spans = _checked(_by_name(epochs, self._names), self._names)

    @classmethod
    def all_at_once(cls, net: fx.GraphModule, epochs: int) -> BlockSchedule:
        """Return the schedule by which every block learns in every epoch.

        Args:
            net: what `transform` returned.
            epochs: how many.
        """
        count = positive_integer("epochs", epochs)
        return cls(net, [range(count)] * len(_names(net)))

    @classmethod
    def greedy(
        cls, net: fx.GraphModule, epochs: int | Sequence[int] | Mapping[str, int]
    ) -> BlockSchedule:
        """Return the schedule by which one block learns after the other, the first one first.

        Args:
            net: what `transform` returned.
            epochs: how many for each block, how many by the block's name, or in order.
        """
        names = _names(net)
        counts: Any = epochs
        if isinstance(epochs, Integral):
            counts = dict.fromkeys(names, epochs)
        spans: dict[str, range] = {}
        start = 0
        for name, given in _by_name(counts, names).items():
            count = positive_integer(f"epochs of {name}", given)
            spans[name] = range(start, start + count)
            start += count
        return cls(net, spans)

    @classmethod
    def from_losses(
        cls,
        net: fx.GraphModule,
        losses: Sequence[Mapping[str, float]],
        patience: int = 3,
        threshold: float = 1e-3,
    ) -> BlockSchedule:
        """Return the schedule by which each block stops where its loss stopped falling.

        This is phase one of section 2.3.4 of the SFF paper: train all blocks for some epochs, and
        keep the losses of each epoch. Phase two trains a new net by the schedule.

        All blocks begin in epoch 0. A block's plateau begins when its loss has not fallen for
        `patience` epochs. The block stops after the last epoch in which its loss fell. It never
        stops before an earlier block, whose output would change under it. A block without a plateau
        learns in all epochs.

        Args:
            net: what `transform` returned.
            losses: of each epoch, by the block's name; of training or of validation, such as
                `sffx.evaluate(net, loader).loss`. Other names are passed over.
            patience: how many epochs without a lower loss make a plateau.
            threshold: the share by which a loss must be below the lowest one to count as lower.

        Raises:
            InputError: there are no losses, or one is missing or no number.
        """
        if not isinstance(losses, Sequence) or not losses:
            raise InputError(
                f"losses is {shown(losses)}, which holds no epoch. "
                "Hint: pass a list with sffx.evaluate(net, loader).loss of each epoch"
            )
        patience = positive_integer("patience", patience)
        if not is_number(threshold) or not threshold >= 0:
            raise InputError(f"threshold is {shown(threshold)}. Hint: pass a number, 0 or more")
        spans: dict[str, range] = {}
        end = 1
        for name in _names(net):
            of_block = [_loss(of_epoch, name) for of_epoch in losses]
            # No block stops before an earlier one.
            end = max(end, _plateau(of_block, patience, threshold))
            spans[name] = range(end)
        return cls(net, spans)

    @property
    def epochs(self) -> int:
        """The number of epochs, after which no block learns any more."""
        return max(span.stop for span in self._spans.values())

    @property
    def spans(self) -> dict[str, range]:
        """The epochs of each block that learns, by the block's name."""
        return dict(self._spans)

    def learning(self, epoch: int) -> list[str]:
        """Return the names of the blocks that learn in an epoch, for `blocks=`.

        Args:
            epoch: 0 for the first one.

        Raises:
            InputError: the schedule has no such epoch.
        """
        self._require(epoch)
        return [name for name, span in self._spans.items() if epoch in span]

    def frozen(self, epoch: int) -> list[str]:
        """Return the names of the first blocks that are frozen from an epoch on, for good.

        What the last of them gives can be cached (`sffx.cache_outputs`).

        Args:
            epoch: 0 for the first one.

        Raises:
            InputError: the schedule has no such epoch.
        """
        self._require(epoch)
        frozen: list[str] = []
        for name in self._names:
            # A block without a span never learns, so it is frozen from the start.
            span = self._spans.get(name, range(0))
            if span.stop > epoch:
                break
            frozen.append(name)
        return frozen

    def _require(self, epoch: Any) -> None:
        if not is_integer(epoch) or not 0 <= epoch < self.epochs:
            raise InputError(
                f"the schedule has no epoch {shown(epoch)}, but those from 0 to {self.epochs - 1}. "
                "Hint: for epoch in range(schedule.epochs)"
            )

    def state_dict(self) -> dict[str, list[int]]:
        """Return the first epoch and the end of each block by its name, for a checkpoint."""
        return {name: [span.start, span.stop] for name, span in self._spans.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            InputError: it is of other blocks.
        """
        if not isinstance(state, Mapping):
            raise InputError(
                f"the state is a {type(state).__name__}, not a mapping of names. "
                "Hint: pass what state_dict() returned"
            )
        self._spans = _checked(_by_name(state, self._names), self._names)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockSchedule):
            return NotImplemented
        return self._spans == other._spans

    def __hash__(self) -> int:
        return hash(tuple(self._spans.items()))

    def __repr__(self) -> str:
        parts = [f"{name}: {span.start} to {span.stop}" for name, span in self._spans.items()]
        return f"BlockSchedule({', '.join(parts)})"


def _names(net: fx.GraphModule) -> list[str]:
    """Return the names of the blocks that can learn."""
    return [stage.name for stage in learning_stages(net, None)]


def _by_name(entries: Any, names: list[str]) -> dict[str, Any]:
    """Return the entry of each block by its name, in the order of the blocks.

    Raises:
        InputError: a name is unknown, or there are not as many entries as blocks.
    """
    known = f"Hint: the blocks that learn are {', '.join(names)}"
    if isinstance(entries, Mapping):
        unknown = [name for name in entries if name not in names]
        if unknown or not entries:
            named = ", ".join(map(repr, unknown)) or "no block"
            raise InputError(f"the schedule names {named}. {known}")
        return {name: entries[name] for name in names if name in entries}
    if not isinstance(entries, Sequence) or isinstance(entries, (str, range)):
        raise InputError(
            f"the epochs of a schedule are {shown(entries)}, not one entry a block. {known}"
        )
    if len(entries) != len(names):
        raise InputError(
            f"the schedule has {len(entries)} entries for {len(names)} blocks. {known}"
        )
    return dict(zip(names, entries, strict=True))


def _checked(entries: Mapping[str, Any], names: list[str]) -> dict[str, range]:
    """Return the epochs of each block, in the order of the blocks.

    Raises:
        InputError: an entry is no range of epochs, or nobody learns in an epoch.
    """
    spans = {name: _span(name, entries[name]) for name in names if name in entries}
    # By their beginnings: each span must begin before or where all earlier ones have ended.
    reached = 0
    for span in sorted(spans.values(), key=_start):
        if span.start > reached:
            raise InputError(
                f"no block learns in epoch {reached}. Hint: let the blocks' epochs join, as in "
                "[(0, 2), (2, 4)]"
            )
        reached = max(reached, span.stop)
    return spans


def _start(span: range) -> int:
    return span.start


def _span(name: str, epochs: Any) -> range:
    """Return the epochs of a block as a range."""
    if isinstance(epochs, range) and epochs.step == 1:
        epochs = (epochs.start, epochs.stop)
    is_pair = isinstance(epochs, (tuple, list)) and len(epochs) == 2
    if not is_pair or not all(is_integer(number) for number in epochs):
        raise InputError(
            f"the epochs of {name} are {shown(epochs)}. "
            "Hint: pass its first epoch and the one before which it stops, as (0, 11)"
        )
    first, end = epochs
    if not 0 <= first < end:
        raise InputError(
            f"{name} learns from epoch {first} to before epoch {end}, which is no epoch. "
            "Hint: epochs count from 0; a block that never learns is left out of the mapping"
        )
    return range(int(first), int(end))


def _loss(of_epoch: Any, name: str) -> float:
    """Return the loss of a block in an epoch."""
    loss = of_epoch.get(name) if isinstance(of_epoch, Mapping) else None
    try:
        value = float("nan") if loss is None else float(loss)
    except (TypeError, ValueError):
        value = float("nan")
    if math.isnan(value):
        raise InputError(
            f"the loss of {name} in an epoch is {shown(loss)}. "
            "Hint: pass sffx.evaluate(net, loader).loss of each epoch"
        )
    return value


def _plateau(losses: Sequence[float], patience: int, threshold: float) -> int:
    """Return the number of epochs until a loss stopped falling, all of them if it did not."""
    lowest = math.inf
    end = 0
    for epoch, loss in enumerate(losses):
        # Infinity less a share of infinity is not a number, so the first loss is asked for. Losses
        # such as a mean of logarithms may be negative, so the share is of the size.
        is_lower = math.isinf(lowest) or loss < lowest - threshold * abs(lowest)
        if is_lower:
            lowest = loss
            end = epoch + 1
        elif epoch + 1 - end >= patience:
            return end
    return len(losses)
