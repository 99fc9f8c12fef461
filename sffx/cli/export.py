"""The command `sffx-export`: a checkpoint becomes a file for deployment.

`sffx-export run.pt net.onnx --model SOURCE` exports weights. The subcommand `whole` exports a
model that `torch.save(net, path)` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sffx.cli.options import (
    SOURCE_HELP,
    add_cut_options,
    complete_options,
    cut_options,
    with_command,
)
from sffx.errors import InputError, SffxError

if TYPE_CHECKING:
    from torch import fx

COMMANDS = ("weights", "whole")
SUFFIXES = (".onnx", ".pt2")
MIB = 2**20

EXAMPLES = """examples:
  sffx-export run.pt net.onnx --model torchvision.models:resnet18
          a checkpoint of sffx.save_checkpoint or of Lightning, which says how the model was cut
  sffx-export weights.pt net.pt2 --model model.py:make_net --policy "stages(4)" --goodness sff
      --norm layer --input 1,3,128,128
          weights alone, as torch.save(net.state_dict(), path) writes them, do not say it
  sffx-export run.pt net.onnx --model model.py:make_net --readout classifier --class-names names.txt
  sffx-export whole net.pt net.onnx
          a whole model, torch.save(net, path): loading it runs code that lies in the file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, or 2 when something was wrong, which stderr tells.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(with_command(arguments, COMMANDS, "weights"))
    try:
        _export(options)
    except SffxError as error:
        print(f"sffx-export: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sffx-export",
        description="Write the inference graph of a trained, cut model, checked against torch. "
        "Without a subcommand, export weights. "
        "The options of a subcommand: sffx-export weights --help",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{weights,whole}")
    weights = commands.add_parser("weights", help="export weights (may be left out)")
    _add_weights(weights)
    whole = commands.add_parser(
        "whole", help="export a whole model: loading it runs code that lies in the file"
    )
    _add_whole(whole)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(net=_net_from_weights)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or weights alone")
    _add_target(parser)
    parser.add_argument("--model", metavar="SOURCE", required=True, help=SOURCE_HELP)
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load a checkpoint with Python objects in it, which runs code that lies in it",
    )
    add_cut_options(parser)


def _add_whole(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(net=_whole_net)
    parser.add_argument("checkpoint", type=Path, help="a whole model, torch.save(net, path)")
    _add_target(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    """Add what is written, and where."""
    parser.add_argument(
        "target",
        metavar="net.onnx",
        type=Path,
        help="the file to write: .onnx, or .pt2 for torch.export",
    )
    parser.add_argument(
        "--readout",
        help="ensemble, last, classifier, weighted or cumulative "
        "(default: weighted if the blocks were weighed, else ensemble)",
    )
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


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 0.5,0.5,0.5"
        ) from None


def _export(options: argparse.Namespace) -> None:
    """Write the file and say what is in it."""
    if options.target.suffix not in SUFFIXES:
        raise InputError(
            f"{str(options.target)!r} ends in neither {' nor '.join(SUFFIXES)}. "
            "Hint: net.onnx, or net.pt2 for torch.export"
        )
    class_names = _class_names(options.class_names)
    # Here and below, imports that need torch: --help should not wait for it.
    from sffx.export.onnx import export_onnx
    from sffx.export.prepare import chosen_readout
    from sffx.export.program import export_program

    net = options.net(options)
    readout = chosen_readout(net, options.readout)
    export = export_onnx if options.target.suffix == ".onnx" else export_program
    export(
        net,
        options.target,
        readout,
        class_names=class_names,
        mean=options.mean,
        std=options.std,
        dynamic_size=options.dynamic_size,
    )
    _report(net, readout, options.target)


def _report(net: fx.GraphModule, readout: str, target: Path) -> None:
    from sffx.net import plan_of

    plan = plan_of(net)
    inputs = []
    for each in plan.inputs:
        sizes = ", ".join(map(str, each.shape))
        inputs.append(f"{each.name} (B, {sizes})" if sizes else f"{each.name} (B,)")
    print(
        f"wrote {target}, {target.stat().st_size / MIB:.2f} MiB: {readout} scores of {plan.model}, "
        f"{len(plan)} blocks, {plan.num_classes} classes, from {', '.join(inputs)}"
    )


def _class_names(path: Path | None) -> list[str] | None:
    """Return the names in a file, a name on each line or a JSON list.

    Raises:
        InputError: the file cannot be read.
    """
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


def _net_from_weights(options: argparse.Namespace) -> fx.GraphModule:
    """Return the plain model, cut as the trained one was and filled with its weights."""
    from sffx.checkpoint import load_checkpoint
    from sffx.cli.models import as_script, find_model

    with as_script(None):
        checkpoint = load_checkpoint(options.checkpoint, trust=options.trust)
    if checkpoint.whole is not None:
        raise InputError(
            f"{str(options.checkpoint)!r} holds a whole model, which is cut already. "
            f"Hint: sffx-export whole {options.checkpoint} {options.target}"
        )
    checkpoint.require_weights()
    arguments = complete_options(checkpoint, cut_options(options))
    model = find_model(options.model, num_classes=arguments.get("num_classes"), filled=True)
    return checkpoint.net(model, **arguments)


def _whole_net(options: argparse.Namespace) -> fx.GraphModule:
    from sffx.checkpoint import load_checkpoint
    from sffx.cli.models import as_script

    # The classes of the model are looked for in the current folder, too.
    with as_script(None):
        return load_checkpoint(options.checkpoint, trust=True).net()


if __name__ == "__main__":
    sys.exit(main())
