"""The forward passes of the blocks of one process of a pipeline."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from sffx.inputs import explaining_errors
from sffx.net import CutModel
from sffx.runtime.stage import Stage, Values
from sffx.runtime.walk import pass_through, score_detached


class Forward:
    """Runs stages of a cut model.

    Args:
        net: the cut model.
        module: the parts of it that this process has.
    """

    def __init__(self, net: CutModel, module: nn.Module) -> None:
        self._net = net
        self._module = module

    def scores(self, stage: Stage, values: Values) -> Tensor:
        """Run a stage, and return its scores."""
        with self._explaining(stage, values):
            return score_detached(stage, values)

    def pass_through(self, stage: Stage, values: Values) -> None:
        """Run a stage that does not learn, without its head, and hand its output on."""
        with self._explaining(stage, values):
            pass_through(self._net, stage, values)

    def _explaining(self, stage: Stage, values: Values) -> AbstractContextManager[None]:
        """Return a context that explains errors of the first stage by the model's inputs."""
        if stage.index:
            return nullcontext()
        # Not the parameters of the net: those of other processes are on no device.
        own = self._module.parameters
        return explaining_errors(self._net.plan.inputs, own, _inputs_among(values))


def _inputs_among(values: Values) -> dict[str, Any]:
    """Return the inputs of the model among the values of nodes, by the inputs' names."""
    return {str(node.target): value for node, value in values.items() if node.op == "placeholder"}
