"""The command `sffx-viz`: how a model is cut, as a picture or as a table.

`sffx-viz model.py` draws. The other subcommands are `plan`, which prints the table of one policy,
and `compare`, which sets several policies side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sffx.cli.messages import exit_code
from sffx.cli.options import SOURCE_HELP, add_cut_options, positive, with_command

COMMANDS = ("draw", "plan", "compare")

EXAMPLES = """examples:
  sffx-viz model.py                           draw the only model in the file
  sffx-viz model.py --model make_net -o net.png
  sffx-viz timm:convnext_tiny -o convnext.html
  sffx-viz torchvision.models:resnet18 --checkpoint run.pt -o trained.svg
  sffx-viz hf:BertConfig --input input_ids=1,32:int --input attention_mask=1,32:int
  sffx-viz plan torchvision.models:resnet18   print the table
  sffx-viz plan torchvision.models:resnet18 --batch 32 --budget '8 GiB'
  sffx-viz compare torchvision.models:resnet18 residual layer 'stages(4)' -o policies.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code, see `exit_code`.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(with_command(arguments, COMMANDS, "draw"))
    return exit_code("sffx-viz", partial(_run, options))


def _run(options: argparse.Namespace) -> None:
    # Only now, because this imports torch, and --help should not wait for it.
    from sffx.cli import drawing

    commands = {"draw": drawing.draw, "plan": drawing.print_plan, "compare": drawing.compare}
    commands[options.command](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sffx-viz",
        description="Show how a model is cut into blocks. Without a subcommand, draw it.\n"
        "sffx-viz draw --help lists the options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{draw,plan,compare}")
    _add_draw(commands.add_parser("draw", help="draw the blocks (may be left out)"))
    _add_plan(commands.add_parser("plan", help="print the table of the blocks"))
    _add_compare(commands.add_parser("compare", help="set policies side by side"))
    return parser


def _add_draw(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="a .svg, .png, .pdf, .html or .dot file (default: NAME.svg)",
    )
    parser.add_argument(
        "--detail",
        choices=("blocks", "modules", "nodes"),
        default="blocks",
        help="what is shown of each block (default: blocks)",
    )
    parser.add_argument(
        "--unfold", action="store_true", help="draw blocks in a row that look alike one by one"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="of a training: colour each block by its accuracy and learning rate",
    )
    parser.add_argument("--open", action="store_true", help="show the drawing")
    add_cut_options(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--batch",
        metavar="B",
        type=positive,
        help="predict the peak memory of a training step, block-local and by backpropagation",
    )
    parser.add_argument(
        "--budget",
        metavar="BYTES",
        help="predict the largest batches whose steps stay within a budget such as '8 GiB'",
    )
    add_cut_options(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "policies", metavar="POLICY", nargs="+", help="two or more, such as residual 'stages(4)'"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="draw them side by side in a .svg, .png, .pdf or .dot file",
    )
    parser.add_argument("--open", action="store_true", help="show the drawing, with -o")
    add_cut_options(parser, policy=False)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="model.py", help=SOURCE_HELP)
    parser.add_argument(
        "--model", metavar="NAME", help="the object in the file, where there are several models"
    )


if __name__ == "__main__":
    sys.exit(main())
