"""The command `sffx-viz`: how a model is cut, as a picture or as a table.

`sffx-viz model.py` draws. The other subcommands are `plan`, which prints the table of one policy,
and `compare`, which sets several policies side by side.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.blocks import BlockPlan
from sffx.cli.options import (
    SOURCE_HELP,
    add_cut_options,
    complete_options,
    cut_options,
    with_command,
)
from sffx.draw.compare import comparison, draw_comparison
from sffx.draw.progress import Progress
from sffx.draw.render import PICTURES, TEXT, check_path, draw, plan_in
from sffx.errors import InputError, MissingExtra, SffxError
from sffx.parts import is_block

if TYPE_CHECKING:
    from torch import nn

    from sffx.checkpoint import Checkpoint

COMMANDS = ("draw", "plan", "compare")

EXAMPLES = """examples:
  sffx-viz model.py                           draw the only model in the file
  sffx-viz model.py --model make_net -o net.png
  sffx-viz timm:convnext_tiny -o convnext.html
  sffx-viz torchvision.models:resnet18 --checkpoint run.pt -o trained.svg
  sffx-viz hf:BertConfig --input input_ids=1,32:int --input attention_mask=1,32:int
  sffx-viz plan torchvision.models:resnet18   print the table
  sffx-viz compare torchvision.models:resnet18 residual layer 'stages(4)' -o policies.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0, or 2 when something was wrong, which stderr tells.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(with_command(arguments, COMMANDS, "draw"))
    try:
        options.run(options)
    except SffxError as error:
        print(f"sffx-viz: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sffx-viz",
        description="Show how a model is cut into blocks. Without a subcommand, draw it. "
        "The options of a subcommand: sffx-viz draw --help",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{draw,plan,compare}")
    _add_draw(commands.add_parser("draw", help="draw the blocks (may be left out)"))
    _add_plan(commands.add_parser("plan", help="print the table of the blocks"))
    _add_compare(commands.add_parser("compare", help="set policies side by side"))
    return parser


def _add_draw(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_draw)
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
    parser.set_defaults(run=_print_plan, checkpoint=None)
    _add_model(parser)
    add_cut_options(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_compare, checkpoint=None)
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


def _draw(options: argparse.Namespace) -> None:
    """Draw the plan of a model, in the colours of a training if there is a checkpoint."""
    checkpoint = _checkpoint(options)
    plan = _plan(options, checkpoint)
    progress = None if checkpoint is None else progress_of(checkpoint, plan)
    with _writing():
        path = _draw_file(_titled(plan, options), progress, options)
    print(f"wrote {path}: {len(plan)} feature blocks and the classifier of {plan.model}")
    if options.open:
        _show(path)


def _print_plan(options: argparse.Namespace) -> None:
    print(_plan(options, None))


def _compare(options: argparse.Namespace) -> None:
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
        plan = _plan_of(model, {"policy": policy}, options)
        plans.append(_titled(plan, options))
    print(comparison(plans))
    if options.output is None:
        return
    with _writing():
        path = draw_comparison(plans, options.output)
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
    # Here and below, imports that need torch: --help should not wait for it.
    from sffx.checkpoint import load_checkpoint

    return load_checkpoint(options.checkpoint)


def _plan(options: argparse.Namespace, checkpoint: Checkpoint | None) -> BlockPlan:
    """Return the plan that the model carries, or that of the checkpoint, or of the options."""
    model = _model(options, checkpoint)
    carried = plan_in(model)
    if carried is not None:
        return carried
    if checkpoint is None:
        return _plan_of(model, {"policy": "residual"}, options)
    import sffx

    return sffx.plan(model, **complete_options(checkpoint, cut_options(options)))


def _plan_of(model: nn.Module, defaults: dict[str, Any], options: argparse.Namespace) -> BlockPlan:
    """Return the plan of a plain model by the options of the command line, and by defaults."""
    import sffx
    from sffx.cli.sources import token_example

    arguments = {**defaults, **cut_options(options)}
    if "example_input" not in arguments and options.source.startswith("hf:"):
        arguments["example_input"] = token_example(model)
    return sffx.plan(model, **arguments)


def _model(options: argparse.Namespace, checkpoint: Checkpoint | None) -> nn.Module:
    from sffx.cli.models import find_model

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
    if not checkpoint.accuracy:
        raise InputError(
            f"{path!r} holds no accuracies of blocks. Hint: "
            "sffx.save_checkpoint(path, net, optimizer, sffx.evaluate(net, loader).accuracy)"
        )
    missing = sorted(set(targets) - set(checkpoint.accuracy))
    if missing:
        raise _other_blocks(path, plan, f"it lacks {', '.join(missing)}")
    others = sorted(name for name in checkpoint.accuracy if is_block(name) and name not in targets)
    if others:
        raise _other_blocks(path, plan, f"it has {', '.join(others)} as well")
    ends = [block.output for block in plan]
    if checkpoint.cut is not None and list(checkpoint.cut["after"]) != ends:
        recorded = ", ".join(checkpoint.cut["after"])
        raise _other_blocks(path, plan, f"they end after {recorded}, not {', '.join(ends)}")
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
    source = str(options.source)
    place, _, thing = source.rpartition(":")
    name = thing.rpartition(".")[2]
    if source.endswith(".py") or place in ("", "hf") or name == plan.model:
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
        return draw(plan, options.output, **shown)
    path = Path(f"{_name(options)}.svg")
    try:
        return draw(plan, path, **shown)
    except MissingExtra as error:
        print(f"sffx-viz: {error}. Writing a page instead.", file=sys.stderr)
        return draw(plan, path.with_suffix(".html"), **shown)


def _name(options: argparse.Namespace) -> str:
    """Return the name of the drawing: the object's if the command line names one, or the file's."""
    if options.model is not None:
        return str(options.model).rpartition(".")[2]
    source = str(options.source)
    place, _, thing = source.rpartition(":")
    if place == "timm":
        return thing.replace("/", "_")
    if Path(source).suffix == ".py":
        return Path(source).stem
    return thing.rpartition(".")[2]


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an error of the file system into a message."""
    try:
        yield
    except OSError as error:
        raise SffxError(f"cannot write the drawing: {error}") from error


def _show(path: Path) -> None:
    webbrowser.open(path.resolve().as_uri())


if __name__ == "__main__":
    sys.exit(main())
