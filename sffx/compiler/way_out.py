"""What to do about a model that has nowhere to cut."""

from __future__ import annotations

from collections.abc import Sequence

from sffx.blocks import Leaf


def way_out(leaves: Sequence[Leaf], refusals: Sequence[str]) -> str:
    """Return what most likely stands in the way of a cut, and a hint.

    Args:
        leaves: the modules that the trace did not look into.
        refusals: for each step, why no cut may lie after it.
    """
    largest = max(leaves, key=lambda leaf: leaf.share, default=None)
    if largest is not None and largest.share > 1 / 3:
        return (
            f"{largest.qualname} ({largest.kind}) holds {largest.share:.0%} of the parameters, and "
            f"the trace did not look into it: {largest.reason}. "
            "Hint: change that line, so that cuts can lie inside the module; or move what it does "
            "into a smaller module"
        )
    if any("is used on both sides" in reason for reason in refusals):
        return (
            "Hint: what learns belongs to one block, so no cut can part the uses of a layer that "
            "runs again and again, as in a recurrent model; let such a layer be one stage among "
            "others, each with weights of its own"
        )
    if any("channel axis" in reason for reason in refusals):
        return (
            "Hint: the channel axis is told by the layers that make and read a value; hand the "
            "value to a linear layer, a convolution or a norm of torch, or end the module with one"
        )
    return (
        "Hint: give the model a value that everything after it is computed from, a float tensor "
        "with the batch axis first and a layer with parameters behind it"
    )
