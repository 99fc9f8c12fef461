"""The record of how a model was cut: check it, and turn it into arguments of `transform`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sffx.arguments import recorded_arguments
from sffx.blocks import Options
from sffx.checkpoint.entries import CUT_KEY
from sffx.compiler.analyse import Analysis
from sffx.compiler.policies import Cuts, Policy, named
from sffx.errors import InputError
from sffx.learning.objectives.records import OBJECTIVES, objective_of_record
from sffx.tasks import CLASSIFICATION, task_of_record

# The options that may be a callable. The record then has only the name of the callable.
CALLABLE_OPTIONS = ("goodness", "norm")


def check_cut(cut: Any) -> None:
    """Raise an InputError that names the first entry that `BlockPlan.record` does not write."""
    hint = "Hint: sffx.save_checkpoint writes it, or save net.plan.record() there"
    if not isinstance(cut, Mapping):
        raise InputError(f"the entry {CUT_KEY!r} is a {type(cut).__name__}, not a mapping. {hint}")
    for name, (is_valid, meaning) in CUT_ENTRIES.items():
        if name not in cut:
            raise InputError(f"the entry {CUT_KEY!r} lacks {name!r}, {meaning}. {hint}")
        if not is_valid(cut[name]):
            raise InputError(
                f"the entry {CUT_KEY!r} has {cut[name]!r} for {name!r}, not {meaning}. {hint}"
            )
    if "task" in cut:
        task_of_record(cut["task"])  # raises for what is no task
    if "objective" in cut:
        _check_objective(cut["objective"], hint)
    if "arguments" in cut:
        _check_arguments(cut, hint)


def _check_objective(record: Any, hint: str) -> None:
    """Raise an InputError if something is no record of an objective, known or not."""
    if not isinstance(record, Mapping) or not _is_name(record.get("name")):
        raise InputError(
            f"the entry {CUT_KEY!r} has {record!r} for 'objective', not a mapping with a name. "
            f"{hint}"
        )
    if record["name"] in OBJECTIVES:
        objective_of_record(record)  # raises for options that it does not have


def _check_arguments(cut: Mapping[str, Any], hint: str) -> None:
    """Raise an InputError if the arguments are no such record, or hold other inputs."""
    try:
        names = recorded_arguments(cut["arguments"]).names
    except ValueError as error:
        raise InputError(f"the entry {CUT_KEY!r} has wrong arguments: {error}. {hint}") from error
    if set(names) != set(cut["inputs"]):
        raise InputError(
            f"the entry {CUT_KEY!r} has arguments with the inputs {', '.join(names)}, "
            f"but lists {', '.join(cut['inputs'])}. {hint}"
        )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_name, value))


def _are_cuts(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(_is_name(cut) or _are_names(cut) for cut in value)


def _are_callables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(name in CALLABLE_OPTIONS for name in value)


def _are_inputs(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(_is_name(name) and _is_input(each) for name, each in value.items())


def _is_input(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"shape", "dtype"} <= set(value):
        return False
    return _is_shape(value["shape"]) and _is_dtype(value["dtype"])


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_positive, value))


def _is_dtype(value: Any) -> bool:
    # The name is looked up in torch, which has more than dtypes: "load" must not pass.
    return _is_name(value) and isinstance(getattr(torch, value, None), torch.dtype)


# The schema of a record: for each of its entries, whether a value is valid, and what it means.
CUT_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "policy": (_is_name, "the name of a policy"),
    "after": (_are_cuts, "the names of the nodes after which the model was cut"),
    "inputs": (_are_inputs, "the shape and the dtype of each input by name"),
    "num_classes": (_is_positive, "the number of classes"),
    "goodness": (_is_name, "the name of a goodness"),
    "kernel_size": (_is_positive, "the kernel size of the heads"),
    "norm": (_is_name, "the name of a norm"),
    "custom": (_are_callables, "which of goodness and norm are callables"),
}


def recorded_options(cut: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `transform` by which a model was cut, without callables.

    Args:
        cut: a record that `check_cut` has checked.
    """
    options = {
        "policy": _recorded_policy(cut),
        "example_input": _recorded_example(cut),
        "num_classes": cut["num_classes"],
        "kernel_size": cut["kernel_size"],
        # A record without a task is one of classification.
        "task": task_of_record(cut["task"]) if "task" in cut else CLASSIFICATION,
    }
    if "objective" in cut and cut["objective"]["name"] in OBJECTIVES:
        options["objective"] = objective_of_record(cut["objective"])
    for name in CALLABLE_OPTIONS:
        # The name of a callable is no argument: the user passes the callable again.
        if name not in cut["custom"]:
            options[name] = cut[name]
    return options


def _recorded_policy(cut: Mapping[str, Any]) -> Policy:
    """Return a policy that cuts where the model was cut.

    It has the name of the policy that chose these cuts, so that the new plan shows the same name.
    """
    cuts = Cuts(tuple(cut["after"]))

    def policy(analysis: Analysis, options: Options) -> Cuts:
        return cuts

    return named(policy, cut["policy"])


def _recorded_example(cut: Mapping[str, Any]) -> Any:
    """Return an example batch of one sample: by name, or nested as the model takes it."""
    # The compiler looks at shapes and dtypes only, so zeros will do.
    example: dict[str, Tensor] = {}
    for name, each in cut["inputs"].items():
        example[name] = torch.zeros(1, *each["shape"], dtype=getattr(torch, each["dtype"]))
    if "arguments" in cut:
        return recorded_arguments(cut["arguments"]).example(example)
    return example
