"""The command `sffx-viz`: how a model would be cut, as a picture or as a table."""

from __future__ import annotations

import argparse
import re
import sys
import webbrowser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sffx.blocks import BlockPlan
from sffx.cli.shapes import SHAPE_HELP, example_of, given_input
from sffx.draw.checkpoint import progress_in, read_mapping
from sffx.draw.compare import comparison, draw_comparison
from sffx.draw.render import PICTURES, TEXT, check_path, draw, plan_in
from sffx.errors import InputError, MissingExtra, SffxError

if TYPE_CHECKING:
    from torch import Tensor

    from sffx.checkpoint import Cut

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
    parser = argparse.ArgumentParser(
        "sffx-viz",
        description="Shows how a model is cut into blocks.",
        epilog=EXAMPLES,
        formatter_class=form,
    )
    parser.add_argument(
        "source",
        metavar="model.py",
        help="a Python file, package.module:callable, timm:NAME or hf:CONFIG_CLASS",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the object in the file, where there are several models"
    )
    parser.add_argument(
        "--policy", help="how the cuts are chosen (default: as the checkpoint says, else residual)"
    )
    beside = "set policies side by side: a table, and a drawing where -o names one"
    parser.add_argument("--compare", metavar="POLICY,POLICY", type=_policies, help=beside)
    parser.add_argument(
        "--input",
        metavar="[NAME=]1,3,224,224[:int]",
        type=given_input,
        action="append",
        default=[],
        help=SHAPE_HELP,
    )
    parser.add_argument("--classes", metavar="N", type=int, help="number of classes")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="a .svg, .png, .pdf, .html or .dot file (default: NAME.svg)",
    )
    parser.add_argument("--plan", action="store_true", help="print the table instead of drawing")
    parser.add_argument(
        "--detail",
        choices=("blocks", "modules", "nodes"),
        default="blocks",
        help="what is shown of each block",
    )
    trained = "colour each block by its accuracy and learning rate, of a training whose checkpoint this is"
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help=trained)
    parser.add_argument(
        "--unfold", action="store_true", help="draw blocks in a row that look alike one by one"
    )
    parser.add_argument("--open", action="store_true", help="show the drawing")
    return parser


def _policies(text: str) -> list[str]:
    """The policies between commas; those in brackets belong to a policy, as in `stages(4)`."""
    policies = [name.strip() for name in re.split(r",(?![^()]*\))", text)]
    if "" in policies or len(policies) < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of policies such as residual,batchnorm"
        )
    return policies


def _run(options: argparse.Namespace) -> int:
    _require_together(options)
    if options.compare is not None:
        return _compare(options)
    content = read_mapping(options.checkpoint) if options.checkpoint is not None else None
    (plan,) = _plans(options, [options.policy], content)
    if options.plan:
        print(plan)
        return 0
    with _writing():
        path = _draw(plan, options, content)
    print(f"wrote {path}: {len(plan)} feature blocks and the classifier of {plan.model}")
    _show(path, options)
    return 0


def _require_together(options: argparse.Namespace) -> None:
    """Refuse options of which one would be passed over."""
    if options.compare is not None and options.checkpoint is not None:
        raise InputError(
            "--checkpoint goes with a drawing of one policy, not with --compare. Hint: --policy as in the training"
        )
    styles = {"--unfold": options.unfold, "--detail": options.detail != "blocks"}
    if options.compare is not None:
        _require_none(
            "--compare draws several policies in brief",
            {"--plan": options.plan, "--policy": options.policy, **styles},
        )
        if options.open and options.output is None:
            raise InputError(
                "--open shows a drawing, and --compare draws where -o names one. Hint: -o policies.svg"
            )
        if options.output is not None:
            check_path(options.output, (*PICTURES, *TEXT))
    elif options.plan:
        drawing = {
            "--output": options.output,
            "--open": options.open,
            "--checkpoint": options.checkpoint,
            **styles,
        }
        _require_none("--plan prints a table and draws nothing", drawing)


def _require_none(why: str, options: Mapping[str, Any]) -> None:
    unused = ", ".join(name for name, value in options.items() if value)
    if unused:
        raise InputError(
            f"{why}, so {unused} would be passed over. Hint: leave out one or the other"
        )


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


def _plans(
    options: argparse.Namespace,
    policies: Sequence[str | None],
    content: Mapping[str, Any] | None = None,
) -> list[BlockPlan]:
    """The plan of the model by each policy, or the one that it carries; of a checkpoint, as its model was cut."""
    # Here, because they import torch, and --help should not wait for it.
    import sffx
    from sffx.checkpoint import Cut, classes_of, heads_of
    from sffx.cli.models import find_model
    from sffx.cli.sources import token_example

    told, state = _trained(content) if content is not None else (None, {})
    model = find_model(
        options.source,
        options.model,
        options.classes or (told and told.num_classes) or classes_of(state),
    )
    known = plan_in(model)
    if known is not None and options.compare is not None:
        raise InputError(
            f"the model is cut already, by the policy {known.policy}, so there is nothing to compare. Hint: name the plain model"
        )
    if known is not None:
        return [known]
    known_cut = told or Cut(
        example=token_example(model) if options.source.startswith("hf:") else None
    )
    example = example_of(options.input)
    plans = []
    for policy in policies:
        said = {"policy": policy, "name": policy and "", "example": example}
        cut = replace(
            known_cut, **{name: value for name, value in said.items() if value is not None}
        )
        heads: dict[str, Any] = {"norm": told.norm} if told is not None else {}
        if state or cut.heads is not None:
            heads |= heads_of(state, model, cut)
        plan = sffx.plan(
            model,
            policy=cut.policy,
            example_input=cut.example,
            num_classes=options.classes,
            **heads,
        )
        plans.append(replace(plan, policy=cut.name) if cut.name else plan)
    return plans


def _trained(content: Mapping[str, Any]) -> tuple[Cut | None, dict[str, Tensor]]:
    """How a checkpoint says that its model was cut, if it does, and its weights; accuracies alone can be drawn without them."""
    from sffx.checkpoint import recorded, weights_of

    told = recorded(content)
    try:
        return told, weights_of(content)
    except InputError:
        return told, {}


def _draw(plan: BlockPlan, options: argparse.Namespace, content: Mapping[str, Any] | None) -> Path:
    progress = progress_in(content, options.checkpoint, plan) if content is not None else None
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
