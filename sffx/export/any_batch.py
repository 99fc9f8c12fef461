"""Whether a model takes every batch size, as a file does, whose batch stays open.

A cut model itself refuses a batch for which the model does something else. A file cannot. So it is
tried on fake tensors, before the exporter runs, at the sizes that the file will be tried at. What
fails is named by its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sffx.blocks import Input
from sffx.compiler.batch_axis import BATCH_SIZES
from sffx.compiler.fake import failures_unlogged, fake_copy
from sffx.errors import ExportError, InputError, first_line
from sffx.export.explain import place_of_node
from sffx.export.prepare import reduce_to_readout
from sffx.export.sizes import VERIFIED_BATCHES
from sffx.inputs import constant_batch
from sffx.net import plan_of, use_codegen

_HINT = (
    "Hint: what is for training, such as norms over parts of a batch, can stand under "
    "'if self.training:'"
)


@failures_unlogged()
def require_any_batch(net: fx.GraphModule, readout: str) -> None:
    """Raise an ExportError if a model does not take every batch size in eval mode.

    Args:
        net: what `sffx.transform` returned.
        readout: that the file will hold; what it does not need may fix the batch.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    probe = fake_copy(net, mode).eval()
    use_codegen(probe, fx.graph.CodeGen())  # takes the inputs one by one
    reduce_to_readout(probe, readout)
    inputs = plan_of(net).inputs
    device = next((each.device for each in net.parameters()), torch.device("cpu"))
    with mode, torch.no_grad():
        if _failure(probe, inputs, BATCH_SIZES[0], device):
            return  # it does not run on fake tensors
        for batch in VERIFIED_BATCHES:
            reason = _failure(probe, inputs, batch, device)
            if reason:
                raise ExportError(
                    f"the model does not take a batch of {batch}, and a file takes any: {reason}. "
                    f"{_HINT}"
                )


def _failure(
    probe: fx.GraphModule, inputs: Sequence[Input], batch: int, device: torch.device
) -> str:
    """Return why a model fails at a batch size, and in which node; "" if it runs."""
    run = _Run(probe)
    try:
        run.run(*constant_batch(inputs, batch, device))
    except InputError as refusal:  # of a guard, which names the module
        return str(refusal).partition(" Hint: ")[0].rstrip(".")
    except Exception as error:
        return f"{first_line(error)} ({run.place})"
    return ""


class _Run(fx.Interpreter):
    """A run of a graph and the graphs that it calls, node by node.

    Args:
        module: with the graph.
        path: its qualname in the net.

    Attributes:
        place: the innermost node that failed, in words; "" as long as none did.
    """

    def __init__(self, module: fx.GraphModule, path: str = "") -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would be part of the error's message
        self._path = path
        self.place = ""

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception:
            self.place = self.place or place_of_node(n, self._path)
            raise

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, fx.GraphModule) or kwargs:
            return super().call_module(target, args, kwargs)
        inner = _Run(module, str(target))
        try:
            return inner.run(*args)
        finally:
            self.place = inner.place
