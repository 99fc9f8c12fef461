"""What a verified model is: it is cut, and nothing differs."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sffx
from sffx.comparison.weights import calibrate, draw_constants
from sffx.compiler.trace.sizes import SETTLED_BY_SIZE
from sffx.compiler.untie import untied
from sffx.learning.losses import block_loss
from sffx.net import CutModel
from sffx.plain import logits_of
from sffx.tasks import CLASSIFICATION, DenseRegression, Task, TokenClassification
from tools.zoo.entries import CLASSES, SAMPLES, Inputs
from tools.zoo.records import Record

# By group of models, the tasks that an output does not tell.
_TASKS: dict[str, Task] = {
    "nodes": TokenClassification(),
    "dense_regression": DenseRegression(),
}

# Runs in which gradients are looked for.
_MOST_RUNS = 8


class Unverified(AssertionError):
    """A model breaks one of the promises. The message is the reason in the table."""


def verify_model(
    model: nn.Module, inputs: Inputs, record: Record, *, onnx: bool = False
) -> CutModel:
    """Cut a model and check every promise. This changes the model's weights.

    Args:
        model: with random weights.
        inputs: for `SAMPLES` samples.
        record: takes the results.
        onnx: whether to export the net as well.

    Raises:
        Unverified: a promise is broken.
        SffxError: the model cannot be cut.
    """
    torch.manual_seed(0)
    draw_constants(model)
    calibrate(model, partial(run_model, inputs=inputs))
    record.parameters = sum(p.numel() for p in model.parameters())
    record.input = ", ".join(f"{name} {_size(value)}" for name, value in inputs.items())
    example, task = _call_arguments(inputs), _TASKS.get(record.group)
    net = sffx.transform(model.train(), example_input=example, task=task, check=False)
    record.blocks, record.notes = len(net.plan), list(net.plan.notes)
    record.leaves = [(leaf.kind, leaf.share, leaf.reason) for leaf in net.plan.leaves]
    record.poor = poor_parts(net.plan, model)
    if len(net.plan) < 2 and not net.plan.notes:
        raise Unverified("one feature block, and the plan does not say why")
    _check_values(model, net, inputs)
    _check_samples(net, inputs)
    # As `transform` did before the cut.
    _check_gradients(untied(model)[0], net, inputs)
    if onnx:
        with tempfile.TemporaryDirectory() as folder:
            sffx.export_onnx(net, Path(folder) / "net.onnx")
        record.onnx = True
    record.finish("verified", "")
    return net


def _size(value: Any) -> Any:
    """Return the size of one sample of an input, or what the input is if it is no tensor."""
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else type(value).__name__


def poor_parts(plan: sffx.BlockPlan, model: nn.Module) -> list[str]:
    """Return each block and each leaf with more than a third of the parameters, and its share.

    No cut divides a layer or a residual block. So a part is passed over if a single layer of it
    holds more than a third, or if it is a single residual block: it joins paths with layers by one
    sum or concatenation, or by one for each time that its layers run.
    """
    # A layer may be an attribute of several modules, and have several names.
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    first_names = [name for name, _ in model.named_parameters()]
    total = sum(sizes[name] for name in first_names)
    poor = []
    for block in plan.all_blocks:
        is_single = _is_one_layer(block.parameters, sizes, total) or _is_one_residual_block(block)
        if block.num_parameters > total / 3 and not is_single:
            poor.append(f"{block.target} ({block.name}): {block.num_parameters / total:.0%}")
    for leaf in plan.leaves:
        own = [name for name in first_names if name.startswith(f"{leaf.qualname}.")]
        if leaf.share > 1 / 3 and not _is_one_layer(own, sizes, total):
            poor.append(f"leaf {leaf.qualname} ({leaf.kind}): {leaf.share:.0%}")
    return poor


def _is_one_layer(names: Iterable[str], sizes: dict[str, int], total: int) -> bool:
    """Return whether one layer among some parameters holds more than a third of the total."""
    layers: Counter[str] = Counter()
    for name in names:
        layers[name.rpartition(".")[0]] += sizes.get(name, 0)
    return max(layers.values(), default=0) > total / 3


def _is_one_residual_block(block: sffx.Block) -> bool:
    """Return whether a block joins paths with layers once each time that its layers run."""
    joins = []
    for node in block.joins:
        if node.join in ("sum", "cat") and max(node.paths) > 0:
            joins.append(node)
    owners = {name.rpartition(".")[0] for name in block.parameters}
    uses = Counter(name for name in block.modules if name in owners)
    return 0 < len(joins) <= max(uses.values(), default=1)


def _call_arguments(inputs: Inputs) -> Any:
    return inputs["x"] if set(inputs) == {"x"} else inputs


def run_model(model: nn.Module, inputs: Inputs, seed: int = 1) -> Tensor:
    """Return the output of a model, or the first of several outputs.

    The random numbers are the same in each call with a seed.
    """
    output: Any = _returned(model, inputs, seed)
    if hasattr(output, "logits"):
        output = output.logits
    return output[0] if isinstance(output, tuple) else output


def _returned(model: nn.Module, inputs: Inputs, seed: int) -> Any:
    """Return all that a model returns."""
    torch.manual_seed(seed)
    random.seed(seed)
    return model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)


def _check_values(model: nn.Module, net: CutModel, inputs: Inputs) -> None:
    """Check that the cut model computes what the original does, and that its outputs tell."""
    report = sffx.check(model, net, _call_arguments(inputs), raises=False)
    difference = report.difference
    is_noted = difference is not None and difference.only_elsewhere and _notes_sizes(net)
    if difference is not None and not is_noted:
        raise Unverified(str(difference))
    _require_telling(report)


def _check_samples(net: CutModel, inputs: Inputs) -> None:
    """Check that in eval mode a change of the first sample leaves the scores of the others.

    A block may read rows of all samples, folded into the batch. If it gives rows to the wrong
    samples, the scores of others change.
    """
    changed = {}
    for name, value in inputs.items():
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        changed[name] = torch.cat([value[:1] + 1, value[1:]]) if is_float else value
    net.eval()
    with torch.no_grad():
        before, after = _scores(net, inputs), _scores(net, changed)
    net.train()
    *blocks, classifier = [
        torch.allclose(one[1:], two[1:], rtol=1e-4, atol=1e-5, equal_nan=True)
        for one, two in zip(before, after, strict=True)
    ]
    # The classifier's scores are the model's own. A model may mix samples itself.
    if classifier and not all(blocks):
        raise Unverified(f"block_{blocks.index(False)} mixes the rows of several samples")


def _scores(net: CutModel, inputs: Inputs, seed: int = 0) -> list[Tensor]:
    """Return the scores of each block, the classifier's last."""
    scores: list[Tensor] = []
    handle = net.readout.register_forward_pre_hook(lambda _, args: scores.extend(args[0]))
    _returned(net, inputs, seed)
    handle.remove()
    return scores


def _require_telling(report: sffx.CheckReport) -> None:
    """Check that in each mode a comparison had outputs that differ between samples.

    A spiking network may be silent at another size.
    """
    for mode in ("train mode", "eval mode"):
        runs = [name for name in report.errors if name.startswith(mode)]
        empty = [name for name in runs if f"values in {name}" in report.skipped]
        if runs and len(empty) == len(runs):
            reason = report.skipped[f"values in {empty[0]}"]
            raise Unverified(f"vacuous: values in {empty[0]}: {reason}")


def _notes_sizes(net: CutModel) -> bool:
    """Return whether the plan says that another size may be computed otherwise."""
    return SETTLED_BY_SIZE in net.plan.notes


def _check_gradients(model: nn.Module, net: CutModel, inputs: Inputs) -> None:
    """Check that each parameter which backpropagation reaches has its gradient from one block.

    It must have the gradient after a `local_loss` step too. Layers that are dropped at random have
    none in some runs, so what differs in one run is looked for in others.
    """
    plan = net.plan
    targets = _targets(plan)
    names = {id(p): name for name, p in net.origin.model.named_parameters()}
    reached: set[str] = set()
    trained: set[str] = set()
    blocks: dict[str, set[int]] = {}
    model.train()
    net.train()
    for seed in range(_MOST_RUNS):
        logits = logits_of(_returned(model, inputs, seed), plan.task, plan.num_classes)
        block_loss(logits, targets, task=plan.task).backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None}
        for key, found in _blocks_that_reach(net, inputs, targets, seed).items():
            if key in names:
                blocks.setdefault(names[key], set()).update(found)
        torch.manual_seed(seed)
        sffx.local_loss(net, _call_arguments(inputs), targets).backward()
        for p in net.parameters():
            if id(p) in names and p.grad is not None:
                trained.add(names[id(p)])
        several = {name for name, found in blocks.items() if len(found) > 1}
        if several:
            raise Unverified(f"gradient from several blocks: {_shown(several)}")
        if reached == trained == set(blocks):
            return
    missing = reached - (trained & set(blocks))
    if missing:
        raise Unverified(f"no gradient, though backpropagation reaches it: {_shown(missing)}")
    surplus = (trained | set(blocks)) - reached
    raise Unverified(f"gradient, though backpropagation does not reach it: {_shown(surplus)}")


def _targets(plan: sffx.BlockPlan) -> Tensor:
    """Return targets of the model's task."""
    if plan.task == CLASSIFICATION:
        return torch.arange(SAMPLES) % CLASSES
    return plan.task.example_targets((SAMPLES, *plan.classifier.shape))


def _blocks_that_reach(
    net: CutModel, inputs: Inputs, targets: Tensor, seed: int
) -> dict[int, set[int]]:
    """Return, for each parameter by its id, the blocks whose loss gives it a gradient."""
    scores = _scores(net, inputs, seed)
    parameters = [p for p in net.parameters() if p.requires_grad]
    blocks: dict[int, set[int]] = {}
    for i, score in enumerate(scores):
        loss = block_loss(score, targets, task=net.plan.task)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                blocks.setdefault(id(p), set()).add(i)
    return blocks


def _shown(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first


def check_refusal(model: nn.Module, record: Record) -> None:
    """Check that a model which is no classifier is refused.

    The error must name a module and the way out.

    Raises:
        Unverified: it is not refused, or the error does not help.
    """
    record.parameters = sum(p.numel() for p in model.parameters())
    example: Any = torch.zeros(1, 3, 64, 64)
    if "raft" in record.name:  # optical flow takes two images
        example = (torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128))
    try:
        sffx.transform(model, example_input=example)
    except sffx.SffxError as error:
        record.notes = [str(error)]
    else:
        raise Unverified("it was cut, although it is no classifier")
    if "backbone" not in record.notes[0]:
        raise Unverified(f"the error does not say what to do: {record.notes[0]}")
    record.finish("verified", "")
