"""The work of `sffx-viz`: find the model, plan its cuts, draw them."""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import sffx
from sffx.blocks import BlockPlan
from sffx.checkpoint import Checkpoint, load_checkpoint
from sffx.cli.cut import FLAGS, complete_options, cut_options
from sffx.cli.models import called, find_model, place_and_name
from sffx.cli.sources import token_example
from sffx.draw.compare import comparison, draw_comparison
from sffx.draw.progress import Progress
from sffx.draw.render import FORMATS, PICTURES, TEXT, check_path, plan_in
from sffx.draw.render import draw as draw_plan
from sffx.errors import InputError, MissingExtra, SffxError
from sffx.parts import is_block
from sffx.plan_table import blocks_in_words


def draw(options: argparse.Namespace) -> None:
    """Draw the plan of a model, in the colours of a training if there is a checkpoint."""
    if options.output is not None:
        # Now, because the plan of a large model takes minutes.
        check_path(options.output, FORMATS)
    checkpoint = _checkpoint(options)
    plan = _plan(options, checkpoint)
    progress = None if checkpoint is None else progress_of(checkpoint, plan)
    plan = _titled(plan, options)
    with _writing():
        path = _draw_file(plan, progress, options)
    print(f"wrote {path}: {blocks_in_words(plan)} and the classifier of {plan.model}")
    if options.open:
        _show(path)


def print_plan(options: argparse.Namespace) -> None:
    """Print the plan, and the predicted memory if a batch size or a budget is given."""
    model = _model(options, None)
    print(_titled(_plan_for(model, options, None), options))
    if options.batch is None and options.budget is None:
        return
    # The memory is that of a cut model.
    net = model
    if plan_in(model) is None:
        net = sffx.transform(model, check=False, **_arguments(model, options))
    if options.batch is not None:
        print(f"\n{sffx.footprint(net, options.batch)}")
    if options.budget is not None:
        print(f"\n{sffx.largest_batch(net, options.budget)}")


def compare(options: argparse.Namespace) -> None:
    """Print several policies side by side, and draw them if there is an output."""
    _check_compare(options)
    model = _model(options, None)
    carried = plan_in(model)
    if carried is not None:
        raise InputError(
            f"the model is cut already, by the policy {carried.policy}, "
            "so there is nothing to compare. Hint: name the plain model"
        )
    plans = []
    for policy in options.policies:
        plan = sffx.plan(model, **_arguments(model, options, policy))
        plans.append(_titled(plan, options))
    print(comparison(plans))
    if options.output is None:
        return
    with _writing():
        path = draw_comparison(plans, options.output)
    print(f"wrote {path}: {len(plans)} policies side by side")
    if options.open:
        _show(path)


def _check_compare(options: argparse.Namespace) -> None:
    """Refuse what could only fail after all policies are planned."""
    if len(options.policies) < 2:
        raise InputError(
            f"{options.policies[0]!r} is one policy, and compare sets several side by side. "
            "Hint: compare model.py residual layer"
        )
    if options.output is not None:
        check_path(options.output, (*PICTURES, *TEXT))
    elif options.open:
        raise InputError(
            "--open shows a drawing, and compare draws where -o names one. Hint: -o policies.svg"
        )


def _checkpoint(options: argparse.Namespace) -> Checkpoint | None:
    if options.checkpoint is None:
        return None
    return load_checkpoint(options.checkpoint)


def _plan(options: argparse.Namespace, checkpoint: Checkpoint | None) -> BlockPlan:
    """Return the plan that the model carries, or that of the checkpoint, or of the options."""
    return _plan_for(_model(options, checkpoint), options, checkpoint)


def _plan_for(
    model: nn.Module, options: argparse.Namespace, checkpoint: Checkpoint | None
) -> BlockPlan:
    carried = plan_in(model)
    if carried is not None:
        _refuse_cut_options(carried, options)
        return carried
    if checkpoint is None:
        return sffx.plan(model, **_arguments(model, options))
    return sffx.plan(model, **complete_options(checkpoint, cut_options(options)))


def _refuse_cut_options(carried: BlockPlan, options: argparse.Namespace) -> None:
    """Refuse options for a cut where the model is cut already. They would change nothing."""
    given = cut_options(options)
    # The callable that makes the model may have taken it.
    given.pop("num_classes", None)
    if given:
        flags = ", ".join(FLAGS[name] for name in given)
        raise InputError(
            f"the model is cut already, by the policy {carried.policy}, and {flags} would change "
            "nothing. Hint: leave that out, or name the plain model"
        )


def _arguments(
    model: nn.Module, options: argparse.Namespace, policy: str = "residual"
) -> dict[str, Any]:
    """Return the arguments of `sffx.plan` for a plain model.

    Args:
        model: to cut.
        options: of the command line.
        policy: where the command line has none.
    """
    arguments = {"policy": policy, **cut_options(options)}
    if "example_input" not in arguments and options.source.startswith("hf:"):
        arguments["example_input"] = token_example(model)
    return arguments


def _model(options: argparse.Namespace, checkpoint: Checkpoint | None) -> nn.Module:
    num_classes = options.classes
    if num_classes is None and checkpoint is not None and checkpoint.cut is not None:
        num_classes = checkpoint.cut["num_classes"]
    return find_model(options.source, options.model, num_classes)


def progress_of(checkpoint: Checkpoint, plan: BlockPlan) -> Progress:
    """Return what a drawing shows of a training.

    Args:
        checkpoint: of the training.
        plan: of the model that was trained.

    Returns:
        The accuracies of all blocks, and the learning rates of those that were trained.

    Raises:
        InputError: the checkpoint has no accuracies, or is of other blocks.
    """
    path = str(checkpoint.path)
    targets = [block.target for block in plan.all_blocks]
    # A classifier that has not learned is not evaluated. It is the last of the targets.
    evaluated = targets if plan.objective.trains_classifier else targets[:-1]
    if not checkpoint.accuracy:
        raise InputError(
            f"{path!r} holds no accuracies of blocks. Hint: "
            "sffx.save_checkpoint(path, net, optimizer, sffx.evaluate(net, loader).accuracy)"
        )
    missing = sorted(set(evaluated) - set(checkpoint.accuracy))
    if missing:
        raise _other_blocks(path, plan, f"it lacks {', '.join(missing)}")
    others = sorted(name for name in checkpoint.accuracy if is_block(name) and name not in targets)
    if others:
        raise _other_blocks(path, plan, f"it has {', '.join(others)} as well")
    # The names fit. But as many blocks may end at other nodes.
    ends = plan.record()["after"]
    if checkpoint.cut is not None and list(checkpoint.cut["after"]) != ends:
        recorded = ", ".join(map(str, checkpoint.cut["after"]))
        own = ", ".join(map(str, ends))
        raise _other_blocks(path, plan, f"they end after {recorded}, not {own}")
    rates = {name: rate for name, rate in checkpoint.rates.items() if name in targets}
    return Progress(checkpoint.accuracy, rates)


def _other_blocks(path: str, plan: BlockPlan, difference: str) -> InputError:
    return InputError(
        f"{path!r} is of other blocks than the {len(plan)} of the policy {plan.policy}: "
        f"{difference}. "
        "Hint: --policy and --input as in the training, or the model that was trained"
    )


def _titled(plan: BlockPlan, options: argparse.Namespace) -> BlockPlan:
    """Return the plan with the name of the architecture: "resnet18 (ResNet)".

    Only the callable of a package names one. A file or a configuration class does not.
    """
    place, thing = place_and_name(options.source)
    # Of "models.Net(16)", the last part of what is called: "Net".
    name = called(thing).rpartition(".")[2]
    if place == "hf" or name in ("", plan.model):
        return plan
    return replace(plan, model=f"{name} ({plan.model})")


def _draw_file(plan: BlockPlan, progress: Progress | None, options: argparse.Namespace) -> Path:
    """Draw into the file that the options name, or into one that is named after the model."""
    shown: dict[str, Any] = {
        "unfold": options.unfold,
        "detail": options.detail,
        "progress": progress,
    }
    if options.output is not None:
        return draw_plan(plan, options.output, **shown)
    path = Path(f"{_name(options)}.svg")
    # Where Graphviz is missing, a page is as good, since no format was asked for.
    try:
        return draw_plan(plan, path, **shown)
    except MissingExtra as error:
        print(f"sffx-viz: {error}. Writing a page instead.", file=sys.stderr)
        return draw_plan(plan, path.with_suffix(".html"), **shown)


def _name(options: argparse.Namespace) -> str:
    """Return the name of the drawing: the object's if the command line names one, or the file's."""
    if options.model is not None:
        return called(options.model).rpartition(".")[2]
    place, thing = place_and_name(options.source)
    if place == "timm":
        return thing.replace("/", "_")
    return called(thing).rpartition(".")[2] or Path(place).stem


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an error of the file system into a message."""
    try:
        yield
    except OSError as error:
        raise SffxError(f"cannot write the drawing: {error}") from error


def _show(path: Path) -> None:
    if webbrowser.open(path.resolve().as_uri()) is False:
        print(f"sffx-viz: there is no browser to show {path} with", file=sys.stderr)
