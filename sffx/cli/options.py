"""The options that both commands have: how a model is cut, and which subcommand is meant.

Nothing here imports torch at the top: `--help` should not wait for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sffx.errors import InputError

if TYPE_CHECKING:
    from sffx.checkpoint import Checkpoint

SOURCE_HELP = "a Python file, file.py:NAME, package.module:callable, timm:NAME or hf:CONFIG_CLASS"

# The option of the command line for each argument of `sffx.transform`.
FLAGS = {
    "policy": "--policy",
    "goodness": "--goodness",
    "kernel_size": "--kernel-size",
    "norm": "--norm",
    "num_classes": "--classes",
    "example_input": "--input",
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
    """Add the options that say how a model is cut.

    Args:
        parser: of a command.
        policy: whether there is a `--policy`.
    """
    group = parser.add_argument_group(
        "how the model is cut (a checkpoint of sffx says it; what is given here wins)"
    )
    if policy:
        group.add_argument("--policy", help="how the cuts are chosen, such as residual")
    group.add_argument(
        "--goodness",
        metavar="NAME",
        help="what a block learns by: sff, cwc, cosine, mlp; or your own callable, file.py:NAME",
    )
    group.add_argument(
        "--kernel-size", metavar="K", type=_positive, help="of the auxiliary convolution"
    )
    group.add_argument(
        "--norm",
        metavar="NAME",
        help="the norm between blocks: layer or none; or your own callable, file.py:NAME",
    )
    group.add_argument("--classes", metavar="N", type=_positive, help="number of classes")
    group.add_argument(
        "--input",
        metavar="[NAME=]1,3,224,224[:int]",
        type=given_input,
        action="append",
        default=[],
        help="shape of an example input, the batch axis first; :int for integers; NAME= and "
        "several times for several inputs",
    )


def cut_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `sffx.transform` that the command line gives.

    Raises:
        InputError: the inputs are named in part, or there is no such goodness or norm of one's own.
    """
    given = {
        "policy": getattr(options, "policy", None),
        "goodness": _name_or_callable(options.goodness),
        "kernel_size": options.kernel_size,
        "norm": _name_or_callable(options.norm),
        "num_classes": options.classes,
        "example_input": example_of(options.input),
    }
    return {name: value for name, value in given.items() if value is not None}


def complete_options(checkpoint: Checkpoint, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by which the model of a checkpoint is cut.

    Args:
        checkpoint: which may say how the model was cut.
        given: the arguments that the command line gives; they win.

    Raises:
        InputError: neither says one of those that are required.
    """
    missing = checkpoint.missing(given)
    if missing:
        flags = [f"{FLAGS[name]} {value}" for name, value in missing.items()]
        raise InputError(
            f"{str(checkpoint.path)!r} does not say all of how its model was cut. "
            f"Hint: {' '.join(flags)} as in the training; sffx.save_checkpoint records them"
        )
    return checkpoint.options(**given)


def given_input(text: str) -> GivenInput:
    """Return what the argument of `--input` says.

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


def example_of(given: Sequence[GivenInput]) -> Any:
    """Return an example input: a tensor, a tuple of them, or a mapping by name; None for none.

    Raises:
        InputError: some inputs have a name, and others have none.
    """
    import torch

    tensors = []
    for each in given:
        tensors.append(torch.zeros(each.shape, dtype=torch.long if each.is_integer else None))
    names = [each.name for each in given if each.name]
    if names and len(names) != len(given):
        raise InputError(
            f"--input is given {len(given)} times, but only {', '.join(names)} by name. "
            "Hint: name all of them, or none"
        )
    if names:
        return dict(zip(names, tensors, strict=True))
    if len(tensors) > 1:
        return tuple(tensors)
    return tensors[0] if tensors else None


def _name_or_callable(text: str | None) -> Any:
    """Return a name as it is, and the object that `file.py:NAME` or `module:NAME` means."""
    if text is None or ":" not in text:
        return text
    from sffx.cli.models import find_callable

    return find_callable(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)
