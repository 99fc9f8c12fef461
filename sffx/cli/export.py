"""The command `sffx-export`: a checkpoint becomes a file for deployment.

`sffx-export run.pt net.onnx --model SOURCE` exports weights. The subcommand `whole` exports a
model that `torch.save(net, path)` wrote.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sffx.cli.messages import exit_code
from sffx.cli.options import SOURCE_HELP, add_cut_options, with_command

COMMANDS = ("weights", "whole")

EXAMPLES = """examples:
  sffx-export run.pt net.onnx --model torchvision.models:resnet18
          a checkpoint of sffx.save_checkpoint or of Lightning records how the model was cut
  sffx-export weights.pt net.pt2 --model model.py:make_net --policy "stages(4)" --goodness sff
      --norm layer --input 1,3,128,128
          weights alone, as torch.save(net.state_dict(), path) writes them, do not
  sffx-export run.pt net.onnx --model model.py:make_net --readout classifier --class-names names.txt
  sffx-export whole net.pt net.onnx
          a whole model, torch.save(net, path): loading it runs code that lies in the file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code, see `exit_code`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(with_command(arguments, COMMANDS, "weights"))
    return exit_code("sffx-export", partial(_run, options))


def _run(options: argparse.Namespace) -> None:
    # Only now, because this imports torch, and --help should not wait for it.
    from sffx.cli.exporting import export

    export(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sffx-export",
        description="Write the inference graph of a trained, cut model, checked against torch.\n"
        "Without a subcommand, export weights. sffx-export weights --help lists the options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{weights,whole}")
    weights = commands.add_parser("weights", help="export weights (may be left out)")
    _add_weights(weights)
    whole = commands.add_parser(
        "whole", help="export a whole model: loading it runs code that lies in the file"
    )
    _add_whole(whole)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
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
        help="ensemble, last, classifier, weighted or cumulative (default: that of the net)",
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


if __name__ == "__main__":
    sys.exit(main())
