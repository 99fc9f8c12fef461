"""The policy that cuts for a memory budget."""

from __future__ import annotations

from sffx.blocks import Options
from sffx.checks import positive_integer
from sffx.compiler.analyse import Analysis
from sffx.compiler.policies import Cuts, Policy, named
from sffx.compiler.spans import group_ends
from sffx.errors import CutError
from sffx.memory.costs import BlockCosts
from sffx.memory.footprint import explaining_overflow
from sffx.memory.search import Search
from sffx.tables import byte_size, read_byte_size


def memory(budget: str | int, batch_size: int) -> Policy:
    """Return the policy that makes the fewest blocks within a memory budget.

    The budget is for the predicted peak of a training step with AdamW,
    `local_loss(net, x, y).backward(); optimizer.step()` (see `sffx.footprint`), with the heads, the
    norms and the `recompute` that `transform` is called with. The cuts lie at ends of BN groups and
    of layers. Among plans of as few blocks, the one of the least peak is chosen. All its blocks
    were counted on fake tensors.

    Args:
        budget: "2 GiB", "500 MB", or a number of bytes.
        batch_size: B.

    Raises:
        InputError: the budget cannot be read, or the batch size is no positive integer.
        CutError: (by the policy) no cuts stay within the budget; names the smallest possible peak.
    """
    batch_size = positive_integer("batch_size", batch_size)
    allowed = read_byte_size(budget)

    def cut(analysis: Analysis, options: Options) -> Cuts:
        if not group_ends(analysis):
            return Cuts(())  # `select` then says why nothing can be cut
        with explaining_overflow(batch_size):
            search = Search(BlockCosts(analysis, batch_size, options))
            path = search.coarsest(allowed)
        if path is None:
            smallest = search.smallest()
            raise CutError(
                f"no cuts keep a step with batch size {batch_size} within {byte_size(allowed)}: "
                f"the smallest achievable peak is {byte_size(smallest.peak)}, "
                f"in {len(smallest.spans) - 1} feature block(s). "
                "Hint: pass a larger budget or a smaller batch size"
            )
        return Cuts(tuple(analysis.steps[end].cut for _, end in path.spans[:-1]))

    return named(cut, f"memory({budget}, {batch_size})")
