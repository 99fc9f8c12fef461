"""The command `sffx-viz`: how a model would be cut, as a picture or as a table."""

from __future__ import annotations

import argparse
import re
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sffx.compiler.plan import BlockPlan
from sffx.draw.checkpoint import read_checkpoint
from sffx.draw.compare import comparison, draw_comparison
from sffx.draw.inputs import SHAPE_HELP, example_of, given_input
from sffx.draw.render import draw, plan_in
from sffx.errors import InputError, MissingExtra, SffxError

EXAMPLES = """examples:
  sffx-viz model.py                           the model in the file: an instance, or a function or class without arguments
  sffx-viz model.py --model make_net -o net.png
  sffx-viz torchvision.models:resnet18 --plan
  sffx-viz torchvision.models:resnet18 --compare residual,batchnorm,layer -o policies.png
  sffx-viz timm:convnext_tiny -o convnext.html
  sffx-viz torchvision.models:resnet18 --checkpoint run.ckpt -o trained.svg
  sffx-viz hf:BertConfig --input input_ids=1,32:int --input attention_mask=1,32:int
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
        return _run(options)
    except SffxError as error:
        print(f"sffx-viz: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sffx-viz", description="Shows how a model is cut into blocks.", epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("source", metavar="model.py", help="a Python file, package.module:callable, timm:NAME or hf:CONFIG_CLASS")
    parser.add_argument("--model", metavar="NAME", help="the object in the file, where there are several models")
    parser.add_argument("--policy", default="residual", help="how the cuts are chosen (default: residual)")
    beside = "set policies side by side: a table, and a drawing where -o names one"
    parser.add_argument("--compare", metavar="POLICY,POLICY", type=_policies, help=beside)
    parser.add_argument("--input", metavar="[NAME=]1,3,224,224[:int]", type=given_input, action="append", default=[], help=SHAPE_HELP)
    parser.add_argument("--classes", metavar="N", type=int, help="number of classes")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="a .svg, .png, .pdf, .html or .dot file (default: NAME.svg)")
    parser.add_argument("--plan", action="store_true", help="print the table instead of drawing")
    parser.add_argument("--detail", choices=("blocks", "modules", "nodes"), default="blocks", help="what is shown of each block")
    trained = "colour each block by its accuracy and learning rate, of a training whose checkpoint this is"
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help=trained)
    parser.add_argument("--unfold", action="store_true", help="draw blocks in a row that look alike one by one")
    parser.add_argument("--open", action="store_true", help="show the drawing")
    return parser


def _policies(text: str) -> list[str]:
    """The policies between commas; those in brackets belong to a policy, as in `stages(4)`."""
    policies = [name.strip() for name in re.split(r",(?![^()]*\))", text)]
    if "" in policies or len(policies) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of policies such as residual,batchnorm")
    return policies


def _run(options: argparse.Namespace) -> int:
    if options.compare is not None and options.checkpoint is not None:
        raise InputError("--checkpoint goes with a drawing of one policy, not with --compare. Hint: --policy as in the training")
    if options.compare is not None:
        return _compare(options)
    (plan,) = _plans(options, [options.policy])
    if options.plan:
        print(plan)
        return 0
    with _writing():
        path = _draw(plan, options)
    print(f"wrote {path}: {len(plan)} feature blocks and the classifier of {plan.model}")
    _show(path, options)
    return 0


def _compare(options: argparse.Namespace) -> int:
    plans = _plans(options, options.compare)
    print(comparison(plans))
    if options.output is not None:
        with _writing():
            path = draw_comparison(plans, options.output)
        _show(path, options)
    return 0


@contextmanager
def _writing() -> Iterator[None]:
    """Turns an error of the file system into one message."""
    try:
        yield
    except OSError as error:
        raise SffxError(f"cannot write the drawing: {error}") from error


def _show(path: Path, options: argparse.Namespace) -> None:
    if options.open:
        webbrowser.open(path.resolve().as_uri())


def _plans(options: argparse.Namespace, policies: Sequence[str]) -> list[BlockPlan]:
    """The plan of the model by each policy, or the one that it carries."""
    # Here, because they import torch, and --help should not wait for it.
    import sffx
    from sffx.draw.discover import find_model
    from sffx.draw.sources import token_example

    model = find_model(options.source, options.model)
    known = plan_in(model)
    if known is not None and options.compare is not None:
        raise InputError(
            f"the model is cut already, by the policy {known.policy}, so there is nothing to compare. Hint: name the plain model"
        )
    if known is not None:
        return [known]
    example = example_of(options.input)
    if example is None and options.source.startswith("hf:"):
        example = token_example(model)
    return [sffx.plan(model, policy=policy, example_input=example, num_classes=options.classes) for policy in policies]


def _draw(plan: BlockPlan, options: argparse.Namespace) -> Path:
    progress = read_checkpoint(options.checkpoint, plan) if options.checkpoint is not None else None
    shown: dict[str, Any] = {"unfold": options.unfold, "detail": options.detail, "progress": progress}
    if options.output is not None:
        return draw(plan, options.output, **shown)
    path = Path(f"{_name(options)}.svg")
    try:
        return draw(plan, path, **shown)
    except MissingExtra as error:
        print(f"sffx-viz: {error}. Writing the graph as text.", file=sys.stderr)
        return draw(plan, path.with_suffix(".dot"), **shown)


def _name(options: argparse.Namespace) -> str:
    """The name of the drawing: the object's where the command line names one, else the file's."""
    if options.model is not None:
        return str(options.model).rpartition(".")[2]
    source = str(options.source)
    place, _, thing = source.rpartition(":")
    if place == "timm":
        return thing.replace("/", "_")
    return Path(source).stem if Path(source).suffix == ".py" else thing.rpartition(".")[2]
