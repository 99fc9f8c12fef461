"""Check that a cut model keeps the promises of the method. The result is checked, not the plan.

1. The graph lints.
2. No parameter has a gradient from the loss of a block that is not its own.
3. No in-place write touches a value that crosses a cut or feeds a head.
4. Each block has one goodness of shape (B, J), and the logits have that shape too. For another
   task than classification, the task says which shapes go with the model's output.
5. A norm returns a value of the shape and dtype that it is given.

The model runs on fake tensors, stage by stage, with its own detaches and no others. It runs in
train mode. For 4 and 5 it also runs in eval mode, where a head may return something else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeCopyMode

from sffx.blocks import BlockPlan
from sffx.compiler.batch_axis import BATCH_SIZES
from sffx.compiler.caches import caches_restored
from sffx.compiler.fake import CountingWrites, fake_tensors
from sffx.compiler.trace.randomness import generators_restored
from sffx.errors import VerifyError, location
from sffx.inputs import bind, constant_batch
from sffx.kernels.batch_slices import counting
from sffx.net import Origin, overrides_mode, plan_of
from sffx.parts import CLASSIFIER, head_name, is_norm, is_trial, owner_of
from sffx.runtime.modes import evaluating
from sffx.runtime.stage import stages_of
from sffx.runtime.walk import input_values, walk_attached
from sffx.tensors import detach_scripts


def verify(net: fx.GraphModule, batch: int = BATCH_SIZES[0]) -> None:
    """Check a cut model on fake tensors. The model and random generators are not touched.

    A model that does not run on fake tensors, as its shapes depend on data, is run for real.

    Args:
        net: the cut model.
        batch: the number of samples.

    Raises:
        VerifyError: a promise is broken; names the value or the parameter.
    """
    net.graph.lint()
    # A leaf may draw from any of them.
    with generators_restored():
        _verify(net, batch)


def _verify(net: fx.GraphModule, batch: int) -> None:
    """Check a cut model on fake tensors, or on real ones where it needs values."""
    mode = CountingWrites(allow_non_fake_inputs=True)
    try:
        with FakeCopyMode(mode):
            probe = twin(net, fake_tensors(net, mode)).train()
        # Fake tensors have no results, so the slices of a large batch need not all run.
        with caches_restored(probe), counting():
            _verify_run(probe, batch, mode)
    except VerifyError:
        raise
    # A part needs values, as a generator of random numbers does, or is stricter on fake tensors.
    except Exception:
        with _explaining_gradients():
            _verify_run(twin(net, {}).train(), batch, nullcontext())


@contextmanager
def _explaining_gradients() -> Iterator[None]:
    """Explain the error of a forward that asks for gradients of a value behind a cut.

    Raises:
        VerifyError: it does.
    """
    try:
        yield
    except RuntimeError as failure:
        # torch says it in several ways.
        if "require grad" not in str(failure):
            raise
        raise VerifyError(
            f"a block does not run in train mode: {failure} ({location(failure)}). A value behind "
            "a cut carries no gradient. Hint: a forward that computes gradients of its input may "
            "begin with x = x if x.requires_grad else x.detach().requires_grad_(); or cut "
            "elsewhere, by a list of node names"
        ) from failure


def twin(net: fx.GraphModule, twins: dict[int, Any]) -> fx.GraphModule:
    """Copy the modules and tensors of a cut model, but share its graphs and their code.

    Copying graphs would cost as much time as everything else.

    Args:
        net: the cut model.
        twins: of its tensors where there are some already, by `id`.
    """
    graph_modules = [module for module in net.modules() if isinstance(module, fx.GraphModule)]
    # In reverse order, a module's children come before the module itself.
    for module in reversed(graph_modules):
        twin = object.__new__(type(module))
        twin.__dict__ = dict(module.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = copy.deepcopy(module.__dict__[name], twins)
        twins[id(module)] = twin
    origin = net.__dict__.get("origin")
    if origin is not None and any(overrides_mode(each) for each in origin.model.modules()):
        # The modes of the twin's layers are set by a model that holds these.
        own = Origin(copy.deepcopy(origin.model, twins))
        twins[id(net)].__dict__["origin"] = own
    detach_scripts(twins[id(net)])
    return twins[id(net)]


def _verify_run(probe: fx.GraphModule, batch: int, mode: AbstractContextManager[Any]) -> None:
    """Run a cut model, and check it.

    Args:
        probe: to run.
        batch: the number of samples.
        mode: in which its input is made. Outside of it the tables of a leaf have values, which the
            leaf may keep.
    """
    plan = plan_of(probe)
    device = next(probe.parameters()).device
    with mode:
        inputs = bind(plan, constant_batch(plan.inputs, batch, device))
    with torch.enable_grad():
        values = _WatchedValues(input_values(probe, inputs))
        scores = _scores(probe, values)
        values.require_unwritten()
        _check_scores(scores, plan, batch)
        _check_gradients(probe, scores, plan)
    # With gradients here too, as some forwards differentiate a value of their own.
    with torch.enable_grad(), evaluating(probe), _naming_eval_mode():
        values = _WatchedValues(input_values(probe, inputs))
        _check_scores(_scores(probe, values), plan, batch, is_training=False)


def _scores(probe: fx.GraphModule, values: dict[fx.Node, Any]) -> list[Tensor]:
    return [own for _, own in walk_attached(stages_of(probe), values)]


@contextmanager
def _naming_eval_mode() -> Iterator[None]:
    try:
        yield
    except VerifyError as failure:
        raise VerifyError(f"in eval mode {failure}") from failure


class _WatchedValues(dict[fx.Node, Any]):
    """The values of the outer graph, with the version that each tensor had when it was added.

    A write in place raises a tensor's version. The values are kept here when the walk removes them.
    """

    def __init__(self, inputs: dict[fx.Node, Any]) -> None:
        super().__init__(inputs)
        self._seen: dict[fx.Node, Any] = {}
        self._versions: dict[fx.Node, int] = {}

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        super().__setitem__(node, value)
        self._seen[node] = value
        # A trial gives an input in other words, on which a model may write as on the input itself.
        is_input = node.op == "call_module" and is_trial(str(node.target))
        if isinstance(value, Tensor) and not is_input:
            self._versions[node] = value._version
        if node.op == "call_module" and is_norm(str(node.target)):
            _check_norm(str(node.target), self._seen[node.all_input_nodes[0]], value)

    def require_unwritten(self) -> None:
        """Raise a VerifyError if a value was written in place after it had been added."""
        for node, version in self._versions.items():
            if self._seen[node]._version != version:
                raise VerifyError(
                    f"the value {node.name!r} crosses a cut or feeds a head, "
                    "and is written in place after that"
                )


def _check_norm(target: str, y: Tensor, value: object) -> None:
    if not isinstance(value, Tensor):
        raise VerifyError(f"{target} returns a {type(value).__name__}, not a tensor")
    if value.shape != y.shape:
        raise VerifyError(
            f"{target} returns shape {tuple(value.shape)} for a value of shape {tuple(y.shape)}"
        )
    if value.dtype != y.dtype:
        raise VerifyError(
            f"{target} returns {value.dtype} for a value of {y.dtype}, and the next block computes "
            "in the dtype of the model. Hint: return normed.to(y.dtype)"
        )


def _check_scores(
    scores: list[Tensor], plan: BlockPlan, batch: int, *, is_training: bool = True
) -> None:
    expected = (batch, *plan.classifier.shape)
    # The heads of an objective may give the loss something else than scores.
    gives_own = is_training and plan.objective.goodness is None
    of_one_row = plan.objective.head_shape(plan.num_classes) if gives_own else None
    sources = [*(head_name(i) for i in range(len(plan))), CLASSIFIER]
    for own, source in zip(scores, sources, strict=True):
        if not isinstance(own, Tensor):
            raise VerifyError(f"{source} returns a {type(own).__name__}, not a tensor")
        if not own.is_floating_point():
            raise VerifyError(f"{source} returns {own.dtype}, not floats")
        has_own_shape = gives_own and source != CLASSIFIER
        if has_own_shape and of_one_row is not None and own.shape != (batch, *of_one_row):
            wanted = (batch, *of_one_row)
            raise VerifyError(f"{source} returns shape {tuple(own.shape)}, not {wanted}")
        if not has_own_shape and not plan.task.fits(own.shape, expected):
            raise VerifyError(
                f"{source} returns shape {tuple(own.shape)}, not {plan.task.shapes} = {expected}"
            )


def _check_gradients(net: fx.GraphModule, scores: list[Tensor], plan: BlockPlan) -> None:
    """Check promise 2.

    The autograd graph of a block's scores says cheaply which parameters they may reach. Only where
    a parameter of another block is among them, a backward pass tells whether it gets a gradient.
    """
    names: dict[Tensor, str] = {p: name for name, p in net.named_parameters() if p.requires_grad}
    losses_by_name: dict[str, list[str]] = {}
    for own, block in zip(scores, plan.all_blocks, strict=True):
        foreign = []
        for leaf in _reached(own):
            if leaf in names and owner_of(names[leaf]) != block.target:
                foreign.append(leaf)
        if not foreign:
            continue
        # Any function of the scores reaches what the loss reaches.
        gradients = torch.autograd.grad(own.sum(), foreign, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(foreign, gradients, strict=True):
            if gradient is not None:
                losses_by_name.setdefault(names[parameter], []).append(block.target)
    for name in names.values():
        if name in losses_by_name:
            raise VerifyError(
                f"parameter {name!r} belongs to {owner_of(name)} but has gradient from the "
                f"loss of {', '.join(losses_by_name[name])}"
            )


def _reached(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of the autograd graph that a value hangs on."""
    ahead = [value.grad_fn]
    seen = set(ahead)
    while ahead:
        step = ahead.pop()
        if step is None:
            continue
        # Only AccumulateGrad, the function of a leaf, has a variable.
        if hasattr(step, "variable"):
            yield step.variable
        for following, _ in step.next_functions:
            if following not in seen:
                seen.add(following)
                ahead.append(following)
