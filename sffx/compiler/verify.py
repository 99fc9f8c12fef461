"""Check a cut model, on fake tensors, for what the method promises; the result is checked, not the input.

1. The graph lints.
2. No parameter has gradient from the loss of a block that is not its own.
3. No in-place write touches a value that crosses a cut or feeds a head.
4. The result returns one goodness of shape (B, J) for each block, and logits of that shape.
5. A norm returns a value of the shape that it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from sffx.blocks import BlockPlan
from sffx.compiler.examples import DATA_DEPENDENT, TRACE_BATCH
from sffx.compiler.fake import fake_tensors
from sffx.errors import VerifyError
from sffx.learning.losses import block_loss
from sffx.parts import is_norm


def verify(net: fx.GraphModule, plan: BlockPlan) -> None:
    """Check the cut model on fake tensors; a model whose shapes depend on data is run for real. The model is not touched.

    Raises:
        VerifyError: a promise is broken; names the value or the parameter.
    """
    net.graph.lint()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        probe = _twin(net, fake_tensors(net, mode)).train()
    try:
        with mode:
            _verify_run(probe, plan)
    except DATA_DEPENDENT:
        with torch.random.fork_rng(devices=[]):
            _verify_run(_twin(net, {}).train(), plan)


def _twin(net: fx.GraphModule, copied: dict[int, Any]) -> fx.GraphModule:
    """Copy the modules and tensors of a cut model, but share its graphs and their code, whose copying would cost as much again.

    Args:
        net: the cut model.
        copied: twins of its tensors where there are some already, by `id`.
    """
    for module in reversed(
        [module for module in net.modules() if isinstance(module, fx.GraphModule)]
    ):  # what a module holds comes first
        twin = object.__new__(type(module))
        held = {
            name: copy.deepcopy(module.__dict__[name], copied)
            for name in ("_parameters", "_buffers", "_modules")
        }
        twin.__dict__ = {**module.__dict__, **held}
        copied[id(module)] = twin
    return copied[id(net)]


def _verify_run(probe: fx.GraphModule, plan: BlockPlan) -> None:
    device = next(probe.parameters()).device
    inputs = [
        torch.ones((TRACE_BATCH, *i.shape), device=device).to(getattr(torch, i.dtype))
        for i in plan.inputs
    ]
    run = _VersionWatch(probe)
    with torch.enable_grad():
        run.run(*inputs)
        run.check()
        _check_scores(run.scores, plan)
        _check_gradients(probe, run.scores, plan)


class _VersionWatch(fx.Interpreter):
    """Runs the outer graph and remembers the version of each value that leaves a block, at the moment it does.

    Attributes:
        scores: what the readout was given, before it is stacked: in the stack, each block's loss reaches all others with zeros.
    """

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net, garbage_collect_values=False)
        self.versions: dict[str, tuple[Tensor, int]] = {}
        self.scores: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.target == "readout":
            args: Any = self.map_nodes_to_values(n.args, n)
            self.scores = list(args[0])
            return None
        value = super().run_node(n)
        if n.op == "call_module" and is_norm(str(n.target)):
            _check_norm(str(n.target), self.env[n.all_input_nodes[0]], value)
        if isinstance(value, Tensor) and n.op != "placeholder":
            self.versions[n.name] = (value, value._version)
        return value

    def check(self) -> None:
        for name, (value, version) in self.versions.items():
            if value._version != version:
                raise VerifyError(
                    f"the value {name!r} crosses a cut or feeds a head, and is written in place after that"
                )


def _check_norm(target: str, y: Tensor, value: object) -> None:
    if not isinstance(value, Tensor):
        raise VerifyError(f"{target} returns a {type(value).__name__}, not a tensor")
    if value.shape != y.shape:
        raise VerifyError(
            f"{target} returns shape {tuple(value.shape)} for a value of shape {tuple(y.shape)}"
        )


def _check_scores(scores: list[Tensor], plan: BlockPlan) -> None:
    expected = (TRACE_BATCH, plan.num_classes)
    for score, target in zip(
        scores, [*(f"head_{i}" for i in range(len(plan))), plan.classifier.target], strict=True
    ):
        if not isinstance(score, Tensor):
            raise VerifyError(f"{target} returns a {type(score).__name__}, not a tensor")
        if not score.is_floating_point():
            raise VerifyError(f"{target} returns {score.dtype}, not floats")
        if tuple(score.shape) != expected:
            raise VerifyError(
                f"{target} returns shape {tuple(score.shape)}, not (B, J) = {expected}"
            )


def _check_gradients(net: fx.GraphModule, scores: list[Tensor], plan: BlockPlan) -> None:
    """Check promise 2: what backpropagation from each block's loss would reach, one backward pass where it reaches another's parameter."""
    names: dict[Tensor, str] = {p: name for name, p in net.named_parameters() if p.requires_grad}
    labels = torch.zeros(TRACE_BATCH, dtype=torch.int64, device=scores[0].device)
    sources: dict[str, list[str]] = {}
    for score, target in zip(
        scores, [*(block.target for block in plan.blocks), plan.classifier.target], strict=True
    ):
        foreign = [p for p in _reached(score) if p in names and _owner(names[p]) != target]
        if foreign:
            gradients = torch.autograd.grad(
                block_loss(score, labels), foreign, retain_graph=True, allow_unused=True
            )
            for p in (
                p for p, gradient in zip(foreign, gradients, strict=True) if gradient is not None
            ):
                sources.setdefault(names[p], []).append(target)
    for name in names.values():
        if name in sources:
            raise VerifyError(
                f"parameter {name!r} belongs to {_owner(name)} but has gradient from the loss of {', '.join(sources[name])}"
            )


def _owner(parameter: str) -> str:
    return parameter.partition(".")[0].replace("head_", "block_")


def _reached(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of the autograd graph that a value hangs on."""
    ahead = [value.grad_fn]
    seen = set(ahead)
    while ahead:
        step = ahead.pop()
        if step is None:
            continue
        if hasattr(step, "variable"):
            yield step.variable
        fresh = {following for following, _ in step.next_functions} - seen
        seen |= fresh
        ahead += fresh
