"""What an exporter is given: a copy of the model for inference, with what one readout needs."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from sffx.errors import ExportError
from sffx.export.explain import first_line
from sffx.inputs import random_batch as random_inputs  # noqa: F401
from sffx.learning.readouts import READOUTS, WEIGHTED, readout_of, require_readout, require_weights
from sffx.runtime.shard import require_whole

CUMULATIVE = "cumulative"


def chosen_readout(net: fx.GraphModule, readout: str | None) -> str:
    """Return the readout to export: the one asked for, or that of the net.

    Raises:
        InputError: there is no such readout, or no block has a weight yet.
    """
    own = readout_of(net)
    if readout is None:
        return own.mode
    require_readout(readout, tuple(READOUTS))
    if readout == WEIGHTED:
        require_weights(own.weights)
    return readout


def inference_copy(net: fx.GraphModule, readout: str) -> fx.GraphModule:
    """Return a copy of the net for inference, without the parts that the readout does not need.

    The copy is on the CPU, in float32, in eval mode, and no parameter requires a gradient.

    Raises:
        InputError: the net is sharded.
        ExportError: the net cannot be copied.
    """
    require_whole(net)
    try:
        model = copy.deepcopy(net)
    except Exception as error:
        raise ExportError(
            f"the model cannot be copied: {first_line(error)}. "
            "Hint: a module that keeps tensors with a grad history as attributes cannot be "
            "copied; detach them"
        ) from error
    model = model.cpu().float().eval().requires_grad_(False)
    _keep(model, readout)
    return model


def _keep(model: fx.GraphModule, readout: str) -> None:
    """Leave out the heads, or the classifier, that the readout does not look at."""
    output = next(node for node in model.graph.nodes if node.op == "output")
    combined: Any = output.args[0]
    # What the readout computes is traced into the graph, which then reads no more than it needs.
    tracer = fx.proxy.GraphAppendingTracer(model.graph)
    scores = [fx.Proxy(node, tracer) for node in combined.args[0]]
    with model.graph.inserting_before(output):
        answer = READOUTS[readout](scores, readout_of(model).weights)
    output.args = (fx.node.map_aggregate(answer, _node_of),)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value
