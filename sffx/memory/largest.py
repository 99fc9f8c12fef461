"""The largest batch whose training step stays within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import nn

from sffx.errors import InputError
from sffx.memory.backpropagation import backpropagation_peak
from sffx.memory.footprint import footprint
from sffx.net import cut_model
from sffx.progress import Progress, running
from sffx.tables import byte_size, read_byte_size

# By this factor the batch grows where no line says how far to go.
GROWTH = 8

# The smallest batch that every model takes.
SMALLEST = 2


@dataclass(frozen=True)
class LargestBatch:
    """The largest batches within a memory budget. Prints as a sentence.

    Attributes:
        budget: bytes.
        block_local: the largest batch size of a block-local step, 0 where no sample fits.
        backpropagation: that of a step of backpropagation of the plain model; None where the plain
            model has nothing to train or does not run on fake tensors.
    """

    budget: int
    block_local: int
    backpropagation: int | None

    def __str__(self) -> str:
        rival = "unknown" if self.backpropagation is None else f"{self.backpropagation:,}"
        return (
            f"largest batch within {byte_size(self.budget)}: {self.block_local:,} by block-local "
            f"steps, {rival} by backpropagation"
        )


@running("predicting memory")
def largest_batch(net: nn.Module, budget: str | int, *, offloaded: bool = False) -> LargestBatch:
    """Predict the largest batch whose step stays within a budget, with AdamW, on fake tensors.

    One sample more than the predicted batch exceeds the budget. Peaks are those of `footprint`.

    Args:
        net: what `transform` returned; it is not touched.
        budget: "2 GiB", "500 MB", or a number of bytes.
        offloaded: predict for a `local_step` once the model is offloaded (`offload`).

    Raises:
        InputError: `net` is no cut model or is sharded, the budget cannot be read, or the model
            needs values.
    """
    allowed = read_byte_size(budget)
    cut = cut_model(net)
    progress = Progress("batch sizes tried")

    def block_local(batch_size: int) -> int:
        progress.advance()
        return footprint(cut, batch_size, offloaded=offloaded, backpropagation=False).peak

    def backpropagation(batch_size: int) -> int:
        progress.advance()
        peak = backpropagation_peak(cut, batch_size)
        if peak is None:
            raise InputError(
                f"the model does not run with batch size {batch_size}. "
                "Hint: sffx.footprint predicts the memory of a batch size that it takes"
            )
        return peak

    own = largest_within(block_local, allowed)
    if backpropagation_peak(cut, SMALLEST) is None:
        return LargestBatch(allowed, own, None)
    return LargestBatch(allowed, own, largest_within(backpropagation, allowed))


def largest_within(peak: Callable[[int], int], budget: int) -> int:
    """Return the largest batch size whose peak is within a budget.

    The peak grows about in proportion to the batch. So a line through two batch sizes says where to
    look, and every third time the middle does, in case the line misleads.

    Args:
        peak: of a batch size, in bytes. It may raise an InputError for a single sample, which
            batch norm refuses.
        budget: bytes.

    Returns:
        A batch size that fits, while the next one does not; 0 if not even one sample fits.
    """
    peak = cache(peak)
    if peak(SMALLEST) > budget:
        return _single(peak, budget)
    fits = SMALLEST
    exceeds = GROWTH * SMALLEST
    while peak(exceeds) <= budget:
        fits, exceeds = exceeds, _beyond(peak, budget, fits, exceeds)
    tries = 0
    while exceeds - fits > 1:
        tries += 1
        between = (fits + exceeds) // 2
        if tries % 3:
            share = (budget - peak(fits)) / (peak(exceeds) - peak(fits))
            # At least one away from both ends, so that each try brings them closer together.
            between = min(max(fits + int(share * (exceeds - fits)), fits + 1), exceeds - 1)
        if peak(between) <= budget:
            fits = between
        else:
            exceeds = between
    return fits


def _beyond(peak: Callable[[int], int], budget: int, smaller: int, larger: int) -> int:
    """Return a batch size that exceeds the budget if the peak goes on along a line.

    Args:
        peak: of a batch size.
        budget: bytes.
        smaller: a batch size within the budget.
        larger: another one, through which the line goes as well.
    """
    rise = (peak(larger) - peak(smaller)) / (larger - smaller)
    if rise <= 0:
        return GROWTH * larger
    ahead = larger + int((budget - peak(larger)) / rise) + 1
    # A line that hardly rises says nothing of far larger batches.
    return min(ahead, GROWTH**2 * larger)


def _single(peak: Callable[[int], int], budget: int) -> int:
    """Return 1 if a single sample fits, or else 0."""
    try:
        return int(peak(1) <= budget)
    except InputError:
        return 0
