"""Compile the blocks of a cut model: each with its head, its loss and its gradients as one graph.

`torch.compile(net)` would compile the forward pass of all blocks as one graph, and a block-local
step would not use it. Here the unit is a *lesson*: one block's forward pass, its head, its loss and
its gradients. No activation leaves the graph, so the compiler may fuse across the forward and the
backward pass. Blocks of the same structure share one compiled lesson.

    learn    -> walk -> Compilation.learn    the compiled lesson, or the stage as it is
    evaluate -> walk -> Compilation.score    the compiled block and head, without gradients
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from sffx.errors import InputError, SffxError, first_line
from sffx.learning.losses import LossFunction, block_loss
from sffx.net import COMPILATION, CutModel, cut_model, require_uncompiled
from sffx.runtime.find_residency import residency_of
from sffx.runtime.gradients import Gradients
from sffx.runtime.randomness import blocks_have_seeds
from sffx.runtime.residency import Residency
from sffx.runtime.skeleton import Skeleton
from sffx.runtime.stage import Stage, Values, stages_of

_log = logging.getLogger(__name__)

# The option of torch by which `torch.autograd.grad` becomes a part of a graph.
_GRADIENTS_IN_GRAPHS = "trace_autograd_ops"

R = TypeVar("R")

# Of the code objects of `_with_own_code`, one for each in this process.
_NUMBERS = count()


def compile(net: nn.Module, **options: Any) -> CutModel:
    """Compile the blocks of a cut model, in place, for training steps and evaluation.

    `local_loss`, `block_losses`, `local_step`, `evaluate` and `block_scores` then run compiled
    blocks. Each distinct block is compiled once, with its head, its loss and its gradients as one
    graph. Training begins to compile in the second step, since the first one checks each block.

    Some blocks run as before: one that cannot be compiled, one with hooks or with a forward set on
    an instance, one where an attribute of a layer has changed since the first step, and every block
    inside `block_seeds`. A warning of the logger "sffx.runtime.compiled" says why, and
    `compiled_blocks` as well. Compiled and other blocks agree up to rounding, but dropout draws
    other numbers.

    Args:
        net: what `transform` returned. It may be trained already.
        options: of `torch.compile`, such as `mode="max-autotune"`, `dynamic` or `backend`.

    Returns:
        The net.

    Raises:
        InputError: `net` is no cut model, is compiled as a whole, or is offloaded, sharded or
            replicated; an option is none of these; or torch is too old.
    """
    cut = cut_model(net)
    require_uncompiled(net)
    if type(residency_of(cut)) is not Residency:
        raise InputError(
            "net is offloaded, sharded or replicated, so its blocks cannot be compiled. "
            "Hint: compile a net that is whole on one device"
        )
    if not hasattr(torch._dynamo.config, _GRADIENTS_IN_GRAPHS):
        raise InputError(
            f"torch {torch.__version__} cannot compile gradients into a graph. "
            "Hint: a later torch, or compile single blocks, net.get_submodule('block_0').compile()"
        )
    _require_known(options)
    vars(cut)[COMPILATION] = Compilation(cut, options)
    return cut


def _require_known(options: dict[str, Any]) -> None:
    """Raise an InputError if an option is none of `torch.compile`, or is not the user's to choose.

    Torch would raise its own error, but in the second step.
    """
    known = set(inspect.signature(torch.compile).parameters) - {"model", "fullgraph"}
    for name in options:
        if name not in known:
            raise InputError(
                f"compile takes no option {name!r}. Hint: it takes {', '.join(sorted(known))}, and "
                "makes one graph of each block in any case"
            )


def compiled_blocks(net: nn.Module) -> dict[str, str]:
    """Return for each block "compiled", "not yet", or why it is not compiled.

    Args:
        net: what `compile` returned.

    Raises:
        InputError: it was not compiled.
    """
    cut = cut_model(net)
    compilation = compilation_of(cut)
    if compilation is None:
        raise InputError("net is not compiled by sffx. Hint: sffx.compile(net)")
    return {stage.name: compilation.state_of(stage) for stage in stages_of(cut)}


def compilation_of(net: fx.GraphModule) -> Compilation | None:
    """Return the compilation of a cut model, None where it is not compiled."""
    compilation: Compilation | None = vars(net).get(COMPILATION)
    # The attributes of a copy are those of the net, but its modules are its own.
    return compilation if compilation is not None and compilation.net is net else None


@dataclass(frozen=True)
class Computed:
    """What a compiled stage computed in a training step.

    Attributes:
        scores: (B, J), detached.
        loss: detached.
        gradients: of the parameters that learn.
    """

    scores: Tensor
    loss: Tensor
    gradients: Gradients


class Compilation:
    """The compiled blocks of one cut model. A copy of the model is not compiled.

    Args:
        net: the model.
        options: of `torch.compile`.
    """

    def __init__(self, net: fx.GraphModule | None, options: dict[str, Any]) -> None:
        self.net = net
        self._options = options
        self._skeletons: dict[Stage, Skeleton] = {}
        self._compiled: dict[Any, _Compiled] = {}
        self._checked: dict[tuple[Stage, int], Any] = {}
        self._reasons: dict[str, str] = {}
        self._in_use: set[str] = set()

    def __reduce__(self) -> Any:
        return Compilation, (None, self._options)

    def state_of(self, stage: Stage) -> str:
        """Return "compiled", "not yet", or why a stage is not compiled."""
        if stage.name in self._reasons:
            return self._reasons[stage.name]
        return "compiled" if stage.name in self._in_use else "not yet"

    def learn(
        self,
        stage: Stage,
        values: Values,
        y: Tensor,
        loss_fn: LossFunction | None,
        parameters: list[nn.Parameter],
    ) -> Computed | None:
        """Run a stage in a training step, and return what it computed.

        None where it is not compiled. Then nothing has run.

        Args:
            stage: to run.
            values: that it reads. What the block computed is added, detached.
            y: targets.
            loss_fn: of the stage, None for the task's.
            parameters: of the stage, those that learn.
        """
        if not parameters or not torch.is_grad_enabled():
            return None
        skeleton = self._usable_skeleton(stage)
        if skeleton is None or self._is_first(stage, loss_fn):
            return None
        compiled = self._compiled_like(skeleton)
        return self._tried(stage, lambda: compiled.learn(skeleton, values, y, loss_fn, parameters))

    def score(self, stage: Stage, values: Values) -> Tensor | None:
        """Return the scores of a stage without gradients.

        None where gradients are wanted, or it is not compiled. Then nothing has run.
        """
        if torch.is_grad_enabled():
            return None
        skeleton = self._usable_skeleton(stage)
        if skeleton is None or self._is_first(stage, "score"):
            return None
        compiled = self._compiled_like(skeleton)
        return self._tried(stage, lambda: compiled.score(skeleton, values))

    def _usable_skeleton(self, stage: Stage) -> Skeleton | None:
        """Return the skeleton of a stage, None if the stage cannot be compiled now."""
        if stage.name in self._reasons or blocks_have_seeds():
            return None
        skeleton = self._skeletons.get(stage)
        if skeleton is None:
            skeleton = Skeleton(stage)
            self._skeletons[stage] = skeleton
        reason = skeleton.why_not()
        if reason:
            self._note(stage, reason)
            return None
        return skeleton

    def _is_first(self, stage: Stage, use: Any) -> bool:
        """Return whether a stage is used in a way for the first time, when it runs as it is.

        An error of the block or of its loss is then explained as for any net. And an attribute that
        its forward sets shows as changed afterwards (`Skeleton.why_not`): compiled code sets none.
        """
        # A loop may make a lambda or a bound method in each step, always of the same code.
        code = getattr(use, "__code__", use)
        # By identity, since a loss may have no hash. It is held, so that its `id` stays its own.
        key = stage, id(code)
        if key not in self._checked:
            self._checked[key] = code
            return True
        return False

    def _compiled_like(self, skeleton: Skeleton) -> _Compiled:
        """Return what is compiled for a structure; the first stage that has it brings it along."""
        structure = skeleton.structure()
        if structure not in self._compiled:
            self._compiled[structure] = _Compiled(skeleton, self._options)
        return self._compiled[structure]

    def _tried(self, stage: Stage, run: Callable[[], R]) -> R | None:
        """Return what a compiled stage computes, None if it cannot be compiled."""
        try:
            with torch._dynamo.config.patch({_GRADIENTS_IN_GRAPHS: True}):
                result = run()
        except SffxError:
            raise
        except _failures() as failure:
            self._note(stage, f"it cannot be compiled: {first_line(failure)}")
            return None
        self._in_use.add(stage.name)
        return result

    def _note(self, stage: Stage, reason: str) -> None:
        self._reasons[stage.name] = reason
        _log.warning("%s runs uncompiled: %s", stage.name, reason)


def _failures() -> tuple[type[Exception], ...]:
    """Return what torch raises before anything of a compiled function has run."""
    # Not at the top: the import takes a second, and most nets are not compiled.
    from torch._dynamo import exc

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit, NotImplementedError


class _Compiled:
    """Compiled code for all stages of one structure.

    Args:
        skeleton: of the first of them. Its module runs with the tensors of each.
        options: of `torch.compile`.
    """

    def __init__(self, skeleton: Skeleton, options: dict[str, Any]) -> None:
        module = skeleton.module
        task = skeleton.task

        def learn(
            tensors: dict[str, Tensor],
            inputs: tuple[Any, ...],
            y: Tensor,
            learning: tuple[str, ...],
            loss_fn: LossFunction | None,
        ) -> Any:
            scores, *kept = functional_call(module, tensors, inputs)
            loss = block_loss(scores, y, loss_fn, task)
            parameters = [tensors[name] for name in learning]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            kept = tree_map_only(Tensor, Tensor.detach, kept)
            return scores.detach(), loss.detach(), gradients, kept

        def score(tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
            scores, *kept = functional_call(module, tensors, inputs)
            return scores, kept

        self._learn = torch.compile(_with_own_code(learn), fullgraph=True, **options)
        self._score = torch.compile(_with_own_code(score), fullgraph=True, **options)

    def learn(
        self,
        skeleton: Skeleton,
        values: Values,
        y: Tensor,
        loss_fn: LossFunction | None,
        parameters: list[nn.Parameter],
    ) -> Computed:
        """Run a lesson of a stage that has this structure."""
        tensors = skeleton.tensors()
        names = {tensor: name for name, tensor in tensors.items()}
        learning = tuple(names[parameter] for parameter in parameters)
        scores, loss, found, kept = self._learn(
            _aliases(tensors), skeleton.inputs(values), y, learning, loss_fn
        )
        skeleton.keep(values, kept)
        gradients: Gradients = {}
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                gradients[parameter] = gradient
        return Computed(scores, loss, gradients)

    def score(self, skeleton: Skeleton, values: Values) -> Tensor:
        """Return the scores of a stage that has this structure."""
        scores, kept = self._score(_aliases(skeleton.tensors()), skeleton.inputs(values))
        skeleton.keep(values, kept)
        return scores


def _aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share the memory of others, and learn where these do.

    Dynamo remembers whether a tensor is the very one that the module holds. This is so for the
    first block of a structure alone, and the next one would be compiled anew.
    """
    aliases = {}
    for name, tensor in tensors.items():
        aliases[name] = tensor.detach().requires_grad_(tensor.requires_grad)
    return aliases


def _with_own_code(function: Any) -> Callable[..., Any]:
    """Return a copy of a function with a code object of its own.

    Dynamo keeps what it compiled by code object, up to a limit, and looks through all of it in each
    call. Two structures must not stand in each other's way. It also keeps the sizes that it has
    seen by file, line and name, and compiles for any size where they differ. So the copy has a name
    of its own: the weights of two structures differ in size, and those of one never do.
    """
    name = f"{function.__name__}_{next(_NUMBERS)}"
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, None, function.__closure__)
