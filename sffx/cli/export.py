"""The command `sffx-export`: a checkpoint becomes a file for deployment."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.cli.shapes import SHAPE_HELP, example_of, given_input
from sffx.errors import InputError, SffxError

if TYPE_CHECKING:
    from torch import fx, nn

    from sffx.checkpoint import Cut

SUFFIXES = (".onnx", ".pt2")
MIB = 2**20

EXAMPLES = """examples:
  sffx-export run.pt net.onnx --model torchvision.models:resnet18 --input 1,3,128,128
                                              weights, as torch.save(net.state_dict(), ...) writes them
  sffx-export last.ckpt net.onnx --model torchvision.models:resnet18
                                              a checkpoint of Lightning or examples/train.py, which says itself how the model was cut
  sffx-export net.pt net.pt2 --model model.py:make_net --policy "stages(4)" --readout classifier --class-names names.txt
  sffx-export whole.pt net.onnx --trust       a whole model, torch.save(net, ...): loading it runs code that lies in the file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        the exit code: 0, or 2 when something was wrong, which stderr tells.
    """
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except SffxError as error:
        print(f"sffx-export: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    about = "Writes the inference graph of a trained, cut model, checked against torch."
    parser = argparse.ArgumentParser(
        "sffx-export", description=about, epilog=EXAMPLES, formatter_class=form
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="weights, a checkpoint of Lightning, or a whole model (with --trust)",
    )
    parser.add_argument(
        "target",
        metavar="net.onnx",
        type=Path,
        help="the file to write: .onnx, or .pt2 for torch.export",
    )
    told = "ensemble, last, classifier, weighted or cumulative (default: weighted if the blocks were weighed, else ensemble)"
    parser.add_argument("--readout", help=told)
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        type=Path,
        help="a name on each line, or a JSON list; kept in the file",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            metavar="0.5,0.5,0.5",
            type=_numbers,
            help=f"of the normalised channels, --{name}=0.5,0.5,0.5; kept in the file",
        )
    parser.add_argument(
        "--dynamic-size",
        action="store_true",
        help="leave height and width open, if the model allows it",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load a file with whole Python objects, which runs code that lies in it",
    )
    weights = parser.add_argument_group("for weights: the model that was cut")
    source = "a Python file, file.py:NAME, package.module:callable, timm:NAME or hf:CONFIG_CLASS"
    weights.add_argument("--model", metavar="SOURCE", help=source)
    weights.add_argument(
        "--policy",
        help="how the cuts were chosen (default: what the checkpoint says, else residual)",
    )
    weights.add_argument(
        "--norm", help="layer or none (default: what the checkpoint says, else layer)"
    )
    weights.add_argument(
        "--classes",
        metavar="N",
        type=_positive,
        help="number of classes (default: that of the heads)",
    )
    weights.add_argument(
        "--input",
        metavar="[NAME=]1,3,224,224[:int]",
        type=given_input,
        action="append",
        default=[],
        help=SHAPE_HELP,
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of classes. Hint: a positive integer"
        )
    return int(text)


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0.5,0.5,0.5"
        ) from None


def _run(options: argparse.Namespace) -> None:
    if options.target.suffix not in SUFFIXES:
        raise InputError(
            f"{str(options.target)!r} ends in neither {' nor '.join(SUFFIXES)}. Hint: net.onnx, or net.pt2 for torch.export"
        )
    names = _class_names(options.class_names)
    # Here, because they import torch, and --help should not wait for it.
    from sffx.export.onnx import export_onnx
    from sffx.export.prepare import chosen_readout
    from sffx.export.program import export_program
    from sffx.net import plan_of

    net = _net(options)
    export: Any = export_onnx if options.target.suffix == ".onnx" else export_program
    told = {"class_names": names, "mean": options.mean, "std": options.std}
    readout = chosen_readout(net, options.readout)
    export(net, options.target, readout, **told, dynamic_size=options.dynamic_size)
    plan, size = plan_of(net), options.target.stat().st_size / MIB
    takes = ", ".join(f"{each.name} {('B', *each.shape)}".replace("'", "") for each in plan.inputs)
    made = f"{readout} scores of {plan.model}, {len(plan)} blocks, {plan.num_classes} classes, from {takes}"
    print(f"wrote {options.target}, {size:.2f} MiB: {made}")


def _class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the class names cannot be read: {error}") from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is no JSON list: {error}. Hint: or write one name on each line"
        ) from error


def _net(options: argparse.Namespace) -> fx.GraphModule:
    """The cut model that the command line means."""
    from torch import nn

    from sffx.checkpoint import (
        classes_of,
        cut_model,
        filled_net,
        load_checkpoint,
        recorded,
        weights_of,
    )

    checkpoint = load_checkpoint(options.checkpoint, trust=options.trust)
    if isinstance(checkpoint, nn.Module):
        _require_unused(options)
        return cut_model(checkpoint)
    state, told = weights_of(checkpoint), recorded(checkpoint)
    if options.model is None:
        raise InputError(
            f"{str(options.checkpoint)!r} holds weights without their model. Hint: --model torchvision.models:resnet18"
        )
    model = _model(
        options.model, options.classes or (told and told.num_classes) or classes_of(state)
    )
    cut = _cut(told, model, options)
    net = filled_net(model, state, cut)
    if told is None:
        _tell_assumed(net, cut, options)
    return net


def _require_unused(options: argparse.Namespace) -> None:
    """Refuse options that say of a model what a whole one says itself."""
    given = [
        f"--{name}"
        for name in ("model", "policy", "norm", "classes", "input")
        if getattr(options, name)
    ]
    if given:
        raise InputError(
            f"{str(options.checkpoint)!r} holds a whole model, of which {', '.join(given)} can say nothing. Hint: leave it out"
        )


def _tell_assumed(net: fx.GraphModule, cut: Cut, options: argparse.Namespace) -> None:
    """Tell what neither the command line nor the file says of the cut. Another one often fits the same weights."""
    from sffx.net import plan_of

    shapes = " ".join(
        f"--input {each.name}={','.join(map(str, (1, *each.shape)))}"
        for each in plan_of(net).inputs
    )
    found = {"policy": f"--policy {cut.policy}", "norm": f"--norm {cut.norm}", "input": shapes}
    assumed = [text for name, text in found.items() if not getattr(options, name)]
    if assumed:
        print(
            f"sffx-export: the file does not say how the model was cut; assumed: {' '.join(assumed)}. "
            'A training that saves net.plan.record() as "sffx_cut" beside the weights needs no assumptions',
            file=sys.stderr,
        )


def _model(source: str, classes: int | None) -> nn.Module:
    from sffx.cli.models import find_model

    return find_model(source, num_classes=classes, filled=True)


def _cut(told: Cut | None, model: nn.Module, options: argparse.Namespace) -> Cut:
    """How the model was cut: what the command line says, else what the checkpoint says, else the defaults."""
    from sffx.checkpoint import Cut
    from sffx.cli.sources import token_example

    cut = told or Cut(example=token_example(model) if options.model.startswith("hf:") else None)
    example = example_of(options.input)
    said = {"policy": options.policy, "norm": options.norm, "example": example}
    return replace(cut, **{name: value for name, value in said.items() if value is not None})
