"""The public way through the compiler: `plan` to look, `transform` to cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from sffx.blocks import BlockPlan, GoodnessMaker, NormMaker, Options
from sffx.compiler.analyse import analyse
from sffx.compiler.partition import make_plan
from sffx.compiler.policies import Policy
from sffx.compiler.rewrite import rewrite
from sffx.compiler.trace.trace import Trace, trace
from sffx.compiler.verify import verify
from sffx.learning.heads import goodness_maker, make_heads
from sffx.learning.norms import make_norms, norm_maker
from sffx.memory.budget import Memory
from sffx.net import with_plan
from sffx.policies import policy_named


@torch.inference_mode(False)  # what is made under inference mode could never be trained
def transform(
    model: nn.Module,
    policy: str | Policy | Iterable[str] = "residual",
    example_input: Any = None,
    num_classes: int | None = None,
    *,
    goodness: str | GoodnessMaker = "sff",
    kernel_size: int = 1,
    norm: str | NormMaker = "layer",
    recompute: bool = True,
) -> fx.GraphModule:
    """Cut a classifier into blocks that learn from their own losses.

    Args:
        model: a classifier whose output is logits (B, J), or holds them first, or as `.logits`; where several of its outputs could be
            logits, `num_classes` tells them. It is copied and left as it is.
        policy: where to cut. "residual", "batchnorm", "layer" or "module"; or one of `sffx.policies` with its parameters, as
            `stages(4)` or "stages(4)"; or names of nodes to cut after (`sffx.plan` lists them); or a function from the analysed graph to
            such names.
        example_input: a tensor, a tuple of positional arguments, or a mapping of keyword arguments; the first axis is the batch. Only
            shapes and dtypes matter. None infers one from the model's first layer.
        num_classes: J, checked against the model's output where given.
        goodness: "sff", an auxiliary convolution in each head; or "cwc", groups of channels and no parameters. Not the paper's, and better
            (README, "Heads"): "mlp", a hidden layer of 128 units over the features of 2 x 2 regions and then a direction for each class,
            "mlp(256, 4)" with 256 units and 4 x 4 regions; "cosine", without the hidden layer, "cosine(4)" of 4 x 4 regions.
            Or a callable of one's own, `(block, num_classes) -> nn.Module`, by the contract in `sffx.learning.heads`.
        kernel_size: of the auxiliary convolution, odd; with "sff" alone.
        norm: "layer", a layer norm without parameters between blocks, or "none", which leaves the model's own function as it was. Or a
            callable of one's own, `(block) -> nn.Module | None`, by the contract in `sffx.learning.norms`.
        recompute: whether the blocks that set the peak of memory compute the outputs of norms and activations again in their backward pass
            instead of keeping them: less memory, for a few per cent more time.

    Returns:
        An ordinary `torch.fx.GraphModule` in the mode of the model. In train mode it returns the goodness of every block and the
        classifier's logits, (K, B, J); in eval mode scores, (B, J), which `net.readout.mode` chooses. `net.plan` is its block plan.

    Raises:
        InputError: an argument cannot be used, or the input cannot be inferred.
        TraceError: the model cannot be traced.
        CutError: there is nothing to cut, or a cut was asked for where none can be.
    """
    traced, blocks = _planned(
        model,
        policy,
        example_input,
        num_classes,
        Options(goodness, kernel_size, norm),
        recompute,
    )
    heads = make_heads(blocks, traced.root)
    norms = make_norms(blocks, traced.root)
    net = rewrite(traced, blocks, heads, norms, recompute=recompute)
    net = with_plan(net, blocks, traced.root)
    verify(net)
    return net


@torch.inference_mode(False)
def plan(
    model: nn.Module,
    policy: str | Policy | Iterable[str] = "residual",
    example_input: Any = None,
    num_classes: int | None = None,
    *,
    goodness: str | GoodnessMaker = "sff",
    kernel_size: int = 1,
    norm: str | NormMaker = "layer",
    recompute: bool = True,
) -> BlockPlan:
    """Return the block plan by which `transform` would cut the model; the arguments and errors are those of `transform`."""
    return _planned(
        model,
        policy,
        example_input,
        num_classes,
        Options(goodness, kernel_size, norm),
        recompute,
    )[1]


def _planned(
    model: nn.Module,
    policy: str | Policy | Iterable[str],
    example_input: Any,
    num_classes: int | None,
    options: Options,
    recompute: bool,
) -> tuple[Trace, BlockPlan]:
    """Trace a model and plan its blocks."""
    goodness_maker(options)
    norm_maker(options)
    name, function = policy_named(policy)
    if isinstance(function, Memory):
        function = replace(function, options=options, recompute=recompute)
    traced = trace(model, example_input, num_classes)
    return traced, make_plan(analyse(traced), name, function, num_classes, options)
