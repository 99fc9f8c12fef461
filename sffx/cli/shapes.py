"""Example inputs as a command line gives them: `--input 1,3,224,224`, `--input input_ids=1,16:int`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sffx.errors import InputError

SHAPE_HELP = "shape of an example input, the batch axis first; :int for integers, NAME= and several times where the model has several"


@dataclass(frozen=True)
class Given:
    """One example input of the command line: its name, "" for none, its shape, and whether it holds integers."""

    name: str
    shape: tuple[int, ...]
    integer: bool


def given_input(text: str) -> Given:
    """Return what the argument of `--input` says; argparse shows the error."""
    name, named, sizes = text.rpartition("=")
    sizes, integer = sizes.removesuffix(":int"), sizes.endswith(":int")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or (named and not name.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape such as 1,3,224,224 or input_ids=1,16:int"
        )
    return Given(name, shape, integer)


def example_of(given: Sequence[Given]) -> Any:
    """What `sffx.plan` takes as its example: a tensor, a tuple of them, or a mapping by name; None where nothing is given."""
    import torch

    tensors = [torch.zeros(one.shape, dtype=torch.long if one.integer else None) for one in given]
    names = [one.name for one in given if one.name]
    if names and len(names) != len(given):
        raise InputError(
            f"--input is given {len(given)} times, but only {', '.join(names)} by name. Hint: name all of them, or none"
        )
    if names:
        return dict(zip(names, tensors, strict=True))
    return tuple(tensors) if len(tensors) > 1 else next(iter(tensors), None)
