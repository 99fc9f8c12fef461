"""Prepare a model for an exporter: a copy for inference, with only the parts a readout needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx

from sffx.blocks import BlockPlan
from sffx.compiler.trace.sizes import remove_guards
from sffx.errors import ExportError, first_line
from sffx.inputs import like_the_model, random_batch
from sffx.learning.readouts import (
    READOUTS,
    WEIGHTED,
    ReadoutName,
    readout_of,
    require_readout,
    require_weights,
)
from sffx.net import cut_model, use_codegen
from sffx.runtime.find_residency import make_whole, require_values
from sffx.tensors import copied

CUMULATIVE = "cumulative"


def chosen_readout(net: fx.GraphModule, readout: str | None) -> ReadoutName:
    """Return the readout to export: the one asked for, or that of the net.

    Raises:
        InputError: there is no such readout, or no block has a weight yet.
    """
    own = readout_of(net)
    if readout is None:
        return cast(ReadoutName, own.mode)
    require_readout(readout, tuple(READOUTS))
    if readout == WEIGHTED:
        require_weights(own.weights)
    return cast(ReadoutName, readout)


@contextmanager
def in_float32() -> Iterator[None]:
    """Run without gradients, and without an autocast of the caller, which would be in the file."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def inference_copy(net: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the net for inference: on the CPU, in float32, in eval mode.

    No parameter of the copy requires a gradient.

    Raises:
        InputError: the net is sharded, or has a tensor without values.
        ExportError: the net cannot be copied, or does not run in float32.
    """
    make_whole(net)
    require_values(net)
    try:
        model = copied(net)
        # An exporter takes the inputs one by one, however the model takes them.
        use_codegen(model, fx.graph.CodeGen())
        _remove_guards(model)
    except Exception as error:
        raise ExportError(
            f"the model cannot be copied: {first_line(error)}. "
            "Hint: a module keeps something as an attribute that copy.deepcopy refuses; "
            "keep that outside the model"
        ) from error
    model = model.cpu().float().eval().requires_grad_(False)
    if any(each.is_floating_point() and each.dtype != torch.float32 for each in net.parameters()):
        _require_float32(model, cut_model(net).plan)
    return model


def _require_float32(model: fx.GraphModule, plan: BlockPlan) -> None:
    """Raise an ExportError if a model of another dtype does not run when it is cast to float32.

    Args:
        model: in float32 and eval mode.
        plan: of the net.
    """
    arguments = like_the_model(model, random_batch(plan.inputs, 2))
    try:
        model(*arguments)
    except RuntimeError as error:
        raise ExportError(
            f"files are written in float32, and the model does not run in it: {first_line(error)}. "
            "Hint: its forward fixes another dtype, as x.double() does; write "
            "x.to(self.layer.weight.dtype), the dtype of a layer that reads the value"
        ) from error


def _remove_guards(model: fx.GraphModule) -> None:
    """Remove what refuses other sizes: the sizes of a file are fixed, or were tried."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            remove_guards(module.graph)
            module.recompile()


def reduce_to_readout(model: fx.GraphModule, readout: str) -> None:
    """Remove the parts of a cut model that a readout does not need.

    The operations of the readout become nodes of the graph, in the place of the readout module.

    Args:
        model: to alter, in eval mode.
        readout: a name in `READOUTS`.
    """
    output = next(node for node in model.graph.nodes if node.op == "output")
    readout_call: Any = output.args[0]
    # An operation on a proxy is not computed, but added to the graph as a node.
    tracer = fx.proxy.GraphAppendingTracer(model.graph)
    scores = [fx.Proxy(node, tracer) for node in readout_call.args[0]]
    with model.graph.inserting_before(output):
        answer = readout_of(model).read(scores, readout)
    output.args = (fx.node.map_aggregate(answer, _node_of),)
    # Parts that the answer does not depend on are dead code now: heads, or the classifier.
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value
