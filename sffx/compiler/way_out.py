"""What to do about a model that has nowhere to cut."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sffx.compiler.trace.trace import Trace


def way_out(trace: Trace, refusals: Sequence[str]) -> str:
    """Return what most likely stands in the way of a cut, and a hint.

    Args:
        trace: of the model.
        refusals: for each step, why no cut may lie after it.
    """
    largest = max(trace.leaves, key=lambda leaf: leaf.share, default=None)
    if largest is not None and largest.share > 1 / 3:
        return (
            f"{largest.qualname} ({largest.kind}) holds {largest.share:.0%} of the parameters, and "
            f"the trace did not look into it: {largest.reason}. "
            "Hint: change that line, so that cuts can lie inside the module; or move what it does "
            "into a smaller module"
        )
    embedding = _tied_by_function(trace)
    if embedding:
        return (
            f"the forward calls {embedding} and computes with its weight elsewhere, too. Hint: "
            "what learns belongs to one block. For an output layer, register head = "
            f"nn.Linear(..., bias=False) and set head.weight = {embedding}.weight; the cut model "
            "then trains one weight for each"
        )
    repeated = _repeated_layer(trace)
    if repeated:
        return (
            f"{repeated} runs more than once. Hint: what learns belongs to one block, so no cut "
            "can part the uses of a layer that runs again and again, as in a recurrent model; let "
            "such a layer be one stage among others, each with weights of its own"
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


def _tied_by_function(trace: Trace) -> str:
    """Return the qualname of an embedding whose weight is read besides; "" for none."""
    called = {str(node.target) for node in trace.graph.nodes if node.op == "call_module"}
    for node in trace.graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or name != "weight" or owner not in called:
            continue
        if isinstance(trace.root.get_submodule(owner), nn.Embedding):
            return owner
    return ""


def _repeated_layer(trace: Trace) -> str:
    """Return the qualname of the first module with parameters that runs again; "" for none."""
    seen: set[str] = set()
    for node in trace.graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        if name in seen and any(True for _ in trace.root.get_submodule(name).parameters()):
            return name
        seen.add(name)
    return ""
