"""The arguments of `sffx.transform` that a command line means."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from sffx.blocks import option_name
from sffx.checkpoint import Checkpoint
from sffx.cli.models import find_callable
from sffx.cli.options import GivenInput
from sffx.errors import InputError
from sffx.progress import LOGGER
from sffx.tasks import CLASSIFICATION, Task
from sffx.tasks.records import task_named, task_of_record

# The option of the command line for each argument of `sffx.transform`.
FLAGS = {
    "policy": "--policy",
    "objective": "--objective",
    "goodness": "--goodness",
    "kernel_size": "--kernel-size",
    "norm": "--norm",
    "num_classes": "--classes",
    "example_input": "--input",
    "task": "--task",
}

# What each required option may be, for one who has to name it.
CHOICES = {
    "policy": "--policy (residual, batchnorm, layer, module or stages(N))",
    "goodness": "--goodness (sff, cwc, cosine, mlp or shared)",
    "norm": "--norm (layer or none)",
    "example_input": "--input 1,3,224,224",
}


def cut_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `sffx.transform` that the command line gives.

    Raises:
        InputError: the inputs are named in part, there is no such task, or no such goodness or norm
            of one's own.
    """
    given = {
        "policy": getattr(options, "policy", None),
        "objective": options.objective,
        "goodness": _name_or_callable(options.goodness),
        "kernel_size": options.kernel_size,
        "norm": _name_or_callable(options.norm),
        "num_classes": options.classes,
        "task": None if options.task is None else task_named(options.task),
        "example_input": example_of(options.input),
    }
    return {name: value for name, value in given.items() if value is not None}


def complete_options(checkpoint: Checkpoint, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by which the model of a checkpoint is cut.

    Args:
        checkpoint: which may record how the model was cut.
        given: the arguments that the command line gives; they win.

    Raises:
        InputError: a required argument is neither recorded nor given.
    """
    missing = checkpoint.missing(given)
    if missing:
        flags = [_flag(name, value) for name, value in missing.items()]
        raise InputError(
            f"{str(checkpoint.path)!r} does not record all of how its model was cut. "
            f"Hint: {', '.join(flags)} as in the training; sffx.save_checkpoint records them"
        )
    for difference in _differences(checkpoint, given):
        LOGGER.warning(difference)
    return checkpoint.options(**given)


def _differences(checkpoint: Checkpoint, given: dict[str, Any]) -> list[str]:
    """Return a sentence for each option that differs from what a checkpoint records.

    It wins, and the weights may fit all the same, but the net is then another one.
    """
    if checkpoint.cut is None:
        return []
    recorded = dict(checkpoint.cut)
    # What is not recorded is the default, as `BlockPlan.record` leaves it out.
    has_task = "task" in recorded
    recorded["task"] = task_of_record(recorded["task"]) if has_task else CLASSIFICATION
    recorded["objective"] = recorded.get("objective", {"name": "sff"})["name"]
    differences = []
    for name in ("objective", "policy", "goodness", "kernel_size", "norm", "task"):
        # The name of a callable depends on the file that it was loaded from.
        if name not in given or name in recorded["custom"]:
            continue
        if given[name] != recorded[name]:
            differences.append(
                f"{str(checkpoint.path)!r} records {FLAGS[name]} {_shown(recorded[name])}, but "
                f"{_shown(given[name])} is given, and used"
            )
    return differences


def _shown(value: Any) -> str:
    """Return an option as a command line has it."""
    if isinstance(value, Task):
        return value.name
    return str(value) if isinstance(value, (str, int)) else option_name(value)


def _flag(name: str, value: str) -> str:
    """Return the option of the command line for an argument of `transform` that is missing."""
    if value == "...":
        return CHOICES[name]
    # A callable is recorded by its name, which does not tell in which file it lies.
    return f"{FLAGS[name]} file.py:NAME ({value})"


def example_of(given: Sequence[GivenInput]) -> Any:
    """Return an example input: a tensor, a tuple of them, or a mapping by name; None for none.

    Raises:
        InputError: some inputs have a name, and others have none, or one is too large.
    """
    tensors = [_zeros(each) for each in given]
    names = [each.name for each in given if each.name]
    if names and len(names) != len(given):
        raise InputError(
            f"--input is given {len(given)} times, but only {', '.join(names)} by name. "
            "Hint: name all of them, or none"
        )
    if len(set(names)) < len(names):
        raise InputError(
            f"--input is given for {', '.join(names)}. Hint: name each input once, "
            "--input input_ids=1,32:int --input attention_mask=1,32:int"
        )
    if names:
        return dict(zip(names, tensors, strict=True))
    if len(tensors) > 1:
        return tuple(tensors)
    return tensors[0] if tensors else None


def _zeros(given: GivenInput) -> torch.Tensor:
    try:
        return torch.zeros(given.shape, dtype=torch.long if given.is_integer else None)
    # What torch raises depends on what does not fit: the memory, or a size into 64 bits.
    except (RuntimeError, TypeError, MemoryError) as error:
        sizes = ",".join(map(str, given.shape))
        raise InputError(
            f"--input {sizes} is too large for the memory of this machine. "
            "Hint: a smaller batch, as 1 in front"
        ) from error


def _name_or_callable(text: str | None) -> Any:
    """Return a name as it is, and the object that `file.py:NAME` or `module:NAME` means."""
    if text is None or ":" not in text:
        return text
    return find_callable(text)
