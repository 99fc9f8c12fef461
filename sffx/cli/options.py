"""The options that both commands have: how a model is cut, and which subcommand is meant.

Nothing here imports torch, so that `--help` does not wait for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SOURCE_HELP = (
    "a Python file, file.py:NAME, package.module:callable, timm:NAME or hf:CONFIG_CLASS; "
    "the code of the file or the package is run"
)

# The name of each task for `--task`, by its class in `sffx.tasks`.
TASK_NAMES = {
    "Classification": "classification",
    "MultiLabel": "multilabel",
    "Regression": "regression",
    "DenseRegression": "dense-regression",
    "Segmentation": "segmentation",
    "MultiLabelSegmentation": "multilabel-segmentation",
    "TokenClassification": "tokens",
    "TokenRegression": "token-regression",
    "LanguageModel": "language",
}


@dataclass(frozen=True)
class GivenInput:
    """One `--input`.

    Attributes:
        name: of the model's argument, "" if none is given.
        shape: with the batch axis first.
        is_integer: whether the tensor holds integers.
    """

    name: str
    shape: tuple[int, ...]
    is_integer: bool


def with_command(argv: Sequence[str], commands: Collection[str], default: str) -> list[str]:
    """Return the arguments with a subcommand in front; the default one may be left out."""
    first = argv[0] if argv else ""
    if first in commands or first in ("-h", "--help"):
        return list(argv)
    return [default, *argv]


def add_cut_options(parser: argparse.ArgumentParser, *, policy: bool = True) -> None:
    """Add the options for how a model is cut.

    Args:
        parser: of a command.
        policy: whether there is a `--policy`.
    """
    group = parser.add_argument_group(
        "how the model is cut (a checkpoint of sffx records it; an option here wins)"
    )
    if policy:
        group.add_argument("--policy", help="how the cuts are chosen, such as residual")
    group.add_argument(
        "--objective",
        metavar="NAME",
        help="how the blocks learn: sff, cwc, ff, ff-unsupervised, scff, ffcl, cffa",
    )
    group.add_argument(
        "--goodness",
        metavar="NAME",
        help="what a block learns by: sff, cwc, cosine, mlp; or your own callable, file.py:NAME",
    )
    group.add_argument(
        "--kernel-size", metavar="K", type=positive, help="of the auxiliary convolution"
    )
    group.add_argument(
        "--norm",
        metavar="NAME",
        help="the norm between blocks: layer or none; or your own callable, file.py:NAME",
    )
    group.add_argument("--classes", metavar="N", type=positive, help="number of classes")
    group.add_argument(
        "--task",
        metavar="NAME",
        help=f"what the model predicts, where its output does not tell: "
        f"{', '.join(TASK_NAMES.values())}; 'segmentation(255)' leaves out label 255",
    )
    group.add_argument(
        "--input",
        metavar="[NAME=]1,3,224,224[:int]",
        type=given_input,
        action="append",
        default=[],
        help="shape of an example input, the batch axis first; :int for integers; NAME= and "
        "several times for several inputs",
    )


def given_input(text: str) -> GivenInput:
    """Return the example input that an argument of `--input` describes.

    Raises:
        ArgumentTypeError: it is no shape; argparse shows the message.
    """
    name, equals, sizes = text.rpartition("=")
    is_integer = sizes.endswith(":int")
    try:
        shape = tuple(int(size) for size in sizes.removesuffix(":int").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or (equals and not name.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape such as 1,3,224,224 or input_ids=1,16:int"
        )
    return GivenInput(name, shape, is_integer)


def positive(text: str) -> int:
    """Return a positive integer.

    Raises:
        ArgumentTypeError: it is none; argparse shows the message.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)
