"""The public way through the compiler: `plan` shows where a model is cut, `transform` cuts it.

Their bodies are the list of the compiler's passes, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from sffx.blocks import BlockPlan, GoodnessMaker, GoodnessName, NormMaker, NormName, Options
from sffx.checks import positive_integer, require_flag
from sffx.comparison.guard import checked
from sffx.compiler.analyse import analyse
from sffx.compiler.batch_first import add_batch_first_views
from sffx.compiler.fake import failures_unlogged
from sffx.compiler.inplace import keep_foreign_values
from sffx.compiler.memory import save_memory
from sffx.compiler.partition import partition
from sffx.compiler.policies import select
from sffx.compiler.rewrite import rewrite
from sffx.compiler.trace.trace import Trace, trace
from sffx.compiler.untie import untied
from sffx.compiler.verify import verify
from sffx.errors import InputError
from sffx.inputs import like_the_model, random_batch
from sffx.learning.heads import goodness_maker, make_heads
from sffx.learning.norms import make_norms, norm_maker
from sffx.learning.objectives.records import ObjectiveName, objective_named
from sffx.net import CutModel
from sffx.objective import Objective
from sffx.parts import CLASSIFIER
from sffx.policies import AnyPolicy, policy_named
from sffx.progress import running
from sffx.tasks import Task
from sffx.tasks.records import require_task

# The samples on which a model is tried that an objective has changed.
_SAMPLES = 2


@running("cutting the model")
@failures_unlogged()
@torch.inference_mode(False)  # tensors made in inference mode could never be trained
def transform(
    model: nn.Module,
    policy: AnyPolicy = "residual",
    example_input: Any = None,
    num_classes: int | None = None,
    *,
    objective: ObjectiveName | Objective = "sff",
    goodness: GoodnessName | str | GoodnessMaker | None = None,
    kernel_size: int = 1,
    norm: NormName | NormMaker | None = None,
    recompute: bool = True,
    check: bool | Literal["auto"] = "auto",
    task: Task | None = None,
) -> CutModel:
    """Cut a model into blocks that learn from their own losses.

    Args:
        model: a classifier, or a model with another task. A classifier's output is logits (B, J),
            or holds them, as `.logits` for example. Of outputs of several widths, `num_classes`
            tells which; of several of one width, as early exits, it is the one that most layers
            lead to. The model is copied, and left as it is.
        policy: where to cut. "residual", "batchnorm", "layer" or "module"; or one of
            `sffx.policies` with its parameters, as `stages(4)` or "stages(4)"; or names of nodes to
            cut after (`sffx.plan` lists them); or a function of your own (see `sffx.policies`).
        example_input: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Tensors may lie in lists, tuples and mappings. The first axis is the batch. Of tensors
            only shapes and dtypes matter; other arguments are fixed to their values here. None
            infers an input from the model's first layer.
        num_classes: J, checked against the model's output where given.
        objective: how the blocks learn. "sff", the default; "cwc"; "ff", supervised
            Forward-Forward; "ff-unsupervised", "scff", "ffcl", "cffa" of the same family; or one of
            `sffx.objectives` with its options, or of your own.
        goodness: how a block's output is scored. None takes the objective's own, by default "sff".
            The paper's are "sff", an auxiliary convolution (section 4.3), and "cwc", groups of
            channels and no parameters. Not the paper's: "mlp", a hidden layer of 128 units over the
            features of 2 x 2 regions and then a direction for each class; "mlp(256, 4)", with 256
            units and 4 x 4 regions; "auto", "mlp(256, 4)" where it takes at most a tenth of the
            block's multiply-adds, else "mlp"; "cosine" and "cosine(4)", without the hidden layer;
            "shared", for tokens, with a copy of the model's output layer. Or a callable
            `(block, num_classes) -> nn.Module`, by the contract in `sffx.learning.heads`.
        kernel_size: of the auxiliary convolution, odd; with "sff" alone.
        norm: between blocks. None takes the objective's own, by default "layer". "layer", a layer
            norm without parameters; "length", which keeps the direction of a sample's output; or
            "none", which leaves the model's own function as it was. Or a callable
            `(block) -> nn.Module | None`, by the contract in `sffx.learning.norms`.
        recompute: whether the blocks that set the peak of memory compute the outputs of norms and
            activations again in their backward pass, instead of keeping them. It saves memory and
            takes a few per cent more time.
        check: whether the cut model is run beside the model, on random numbers, as `sffx.check`
            does it. "auto" compares three calls of a small model, which adds less than half to the
            time of the cut, and nothing of a large one. What differs at other sizes or under
            `torch.no_grad()` only is a note of the plan.
        task: what the model predicts and what a target is, one of `sffx.tasks`. None infers it
            from the output, and refuses an output that is not clear. A task that was inferred and
            is not classification is a note of the plan.

    Returns:
        An ordinary `torch.fx.GraphModule` in the mode of the model. In train mode it returns the
        goodness of every feature block and then the classifier's logits, (K, B, J) for K blocks in
        all; for another task than classification, and for an objective with heads of its own, a
        tuple with the scores of each block. In eval mode it returns the scores (B, J) that
        `net.readout.mode` chooses. `net.plan` is its block plan.

    Raises:
        InputError: an argument cannot be used, or the input cannot be inferred.
        TraceError: the model cannot be traced.
        CutError: there is nothing to cut, or no cut can lie where one was asked for.
        CheckError: the cut model does not compute what the model computes.
    """
    options = _options(objective, goodness, kernel_size, norm, recompute)
    options = _valid(options, task, num_classes)
    model, traced, blocks = _planned(model, policy, example_input, num_classes, task, options)
    heads = make_heads(blocks, traced.root)
    norms = make_norms(blocks, traced.root)
    net = rewrite(traced, blocks, heads, norms)
    # A head reads a block's output, so no later block may write over it.
    keep_foreign_values(net)
    save_memory(net)
    verify(net, traced.batch_size)
    net = checked(model, net, check)
    options.objective.finish(net.get_submodule(CLASSIFIER))
    return net


@running("planning the cuts")
@failures_unlogged()
@torch.inference_mode(False)
def plan(
    model: nn.Module,
    policy: AnyPolicy = "residual",
    example_input: Any = None,
    num_classes: int | None = None,
    *,
    objective: ObjectiveName | Objective = "sff",
    goodness: GoodnessName | str | GoodnessMaker | None = None,
    kernel_size: int = 1,
    norm: NormName | NormMaker | None = None,
    recompute: bool = True,
    task: Task | None = None,
) -> BlockPlan:
    """Return the block plan by which `transform` would cut the model.

    The arguments and errors are those of `transform`, but for `check` and its CheckError.
    """
    options = _options(objective, goodness, kernel_size, norm, recompute)
    options = _valid(options, task, num_classes)
    _, _, blocks = _planned(model, policy, example_input, num_classes, task, options)
    return blocks


def _planned(
    model: nn.Module,
    policy: AnyPolicy,
    example_input: Any,
    num_classes: int | None,
    task: Task | None,
    options: Options,
) -> tuple[nn.Module, Trace, BlockPlan]:
    """Return the model as the objective has prepared it, its trace and its plan."""
    name, choose = policy_named(policy)
    model, notes = untied(model)
    model = options.objective.prepared(model)
    traced = trace(model, example_input, num_classes, task, notes)
    add_batch_first_views(traced)
    analysis = analyse(traced)
    cuts = select(analysis, choose, options)
    blocks = partition(analysis, cuts, options, policy=name, num_classes=num_classes)
    _require_fitting(blocks, model)
    return model, traced, blocks


def _require_fitting(plan: BlockPlan, model: nn.Module) -> None:
    """Raise an InputError if a model cannot learn by the objective of its plan.

    Args:
        plan: of the model.
        model: that is cut, as the objective has prepared it.
    """
    objective = plan.objective
    if plan.nested is not None and (objective.views > 1 or objective.is_tried):
        raise InputError(
            f"the objective {objective.name!r} changes the model's inputs, which lie in nested "
            "arguments. Hint: a wrapper whose forward takes one tensor for each input"
        )
    objective.require(plan.inputs, plan.task, plan.num_classes)
    objective.require_blocks(len(plan))
    if objective.changes_model:
        _require_prepared(plan, model)


def _require_prepared(plan: BlockPlan, model: nn.Module) -> None:
    """Raise an InputError if the objective has made a model that is not what it should be."""
    tensors = like_the_model(model, random_batch(plan.inputs, _SAMPLES))
    names = [each.name for each in plan.inputs]

    def call(changed: nn.Module, values: Mapping[str, Any]) -> Any:
        args, kwargs = plan.call_arguments(values)
        return changed(*args, **kwargs)

    plan.objective.require_prepared(model, call, dict(zip(names, tensors, strict=True)))


def _options(
    objective: ObjectiveName | Objective,
    goodness: str | GoodnessMaker | None,
    kernel_size: int,
    norm: str | NormMaker | None,
    recompute: bool,
) -> Options:
    """Return the options, with the objective's own in the place of None.

    Raises:
        InputError: there is no such objective, or its heads are its own and another is asked for.
    """
    chosen = objective_named(objective)
    if goodness is None:
        goodness = chosen.goodness or chosen.name
    elif chosen.goodness is None and goodness != chosen.name:
        raise InputError(
            f"goodness is {goodness!r}, but the heads of the objective {chosen.name!r} are its "
            "own. Hint: leave it out"
        )
    return Options(goodness, kernel_size, chosen.norm if norm is None else norm, recompute, chosen)


def _valid(options: Options, task: Task | None, num_classes: Any) -> Options:
    """Return the options.

    Raises:
        InputError: a goodness or a norm does not exist, an option does not go with another, a
            goodness has no form for the task, or `num_classes` is no number.
    """
    if num_classes is not None:
        positive_integer("num_classes", num_classes, "pass a positive integer, or leave it out")
    require_task(task)
    require_flag("recompute", options.recompute)
    # Called for their errors only: a wrong name is reported before the model is traced.
    goodness_maker(options, task)
    norm_maker(options)
    return options
