"""What a deployment must know beside the graph: class names and how images are normalised.

It travels in the exported file as one JSON object with the keys

- "readout": "ensemble", "last", "classifier", "weighted" or "cumulative";
- "class_names": the names of the J classes in the order of the scores, or null;
- "task": what the scores are, for another task than classification, as
  `sffx.tasks.task_record` writes it;
- "mean" and "std": the numbers with which each channel was normalised in training,
  `(x - mean) / std`, or null. The graph does not normalise.

It is read back from ONNX Runtime, or from a `.pt2` file, by

    session = onnxruntime.InferenceSession("net.onnx")
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["sffx"])

    files = {"sffx.json": ""}
    program = torch.export.load("net.pt2", extra_files=files)
    metadata = json.loads(files["sffx.json"])
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sffx.blocks import BlockPlan, Input
from sffx.errors import InputError, shown
from sffx.tasks import CLASSIFICATION, task_record

KEY = "sffx"
FILE = "sffx.json"


def metadata(
    plan: BlockPlan,
    readout: str,
    class_names: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> str:
    """Return the JSON object.

    Raises:
        InputError: the number of names is not J, or `mean` and `std` do not fit each other or the
            channels of an input.
    """
    content = {"readout": readout, **names_and_normalisation(plan, class_names, mean, std)}
    if plan.task != CLASSIFICATION:
        content["task"] = task_record(plan.task)
    return json.dumps(content, ensure_ascii=False)


def names_and_normalisation(
    plan: BlockPlan,
    class_names: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Any]:
    """Return the entries "class_names", "mean" and "std", each a list or None.

    Raises:
        InputError: as `metadata`.
    """
    return {
        "class_names": _checked_names(class_names, plan.num_classes),
        **checked_normalisation(plan.inputs, mean, std),
    }


def _checked_names(names: Sequence[str] | None, classes: int) -> list[str] | None:
    if names is None:
        return None
    # A string is a sequence of strings as well, but surely not a list of names.
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"class_names is {shown(names)}. Hint: pass a list of strings, one for each class"
        )
    if len(names) != classes:
        raise InputError(
            f"there are {len(names)} class names, but the model has {classes} classes. "
            "Hint: name each class once, in order"
        )
    seen = set()
    for name in names:
        if not _is_text(name):
            raise InputError(
                f"the class name {name!r} has a character that no file can hold. "
                "Hint: a lone surrogate comes from bytes that were decoded in a wrong way"
            )
        if name in seen:
            raise InputError(
                f"the class name {name!r} is given twice. Hint: name each class once, in order"
            )
        seen.add(name)
    return list(names)


def _is_text(name: str) -> bool:
    """Return whether a string can be written to a file; one with a lone surrogate cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_numbers(name: str, numbers: Any) -> None:
    """Raise an InputError if something is neither None nor a list of numbers."""
    if numbers is None:
        return
    try:
        is_list = len([float(number) for number in numbers]) == len(numbers)
    except (TypeError, ValueError):
        is_list = False
    if not is_list or isinstance(numbers, str):
        raise InputError(
            f"{name} is {shown(numbers)}. Hint: pass a list with a number for each channel"
        )


def checked_normalisation(
    inputs: Sequence[Input], mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, list[float] | None]:
    """Return what was given as lists of numbers.

    Raises:
        InputError: `mean` and `std` do not fit each other or the channels of an input.
    """
    if mean is None and std is None:
        return {"mean": None, "std": None}
    for name, numbers in (("mean", mean), ("std", std)):
        _require_numbers(name, numbers)
    if mean is None or std is None or len(mean) != len(std):
        raise InputError(
            f"mean is {mean} and std is {std}. Hint: pass both, with a number for each channel"
        )
    means = [float(value) for value in mean]
    deviations = [float(value) for value in std]
    usable = all(map(math.isfinite, means + deviations)) and min(deviations, default=1) > 0
    if not usable:
        raise InputError(f"mean is {mean} and std is {std}. Hint: numbers, those of std above 0")
    channels = [each.shape[0] for each in inputs if len(each.shape) > 1]
    if channels and len(means) not in channels:
        raise InputError(
            f"mean and std have {len(means)} numbers, but the input has {channels[0]} channels. "
            "Hint: a number for each channel"
        )
    return {"mean": means, "std": deviations}
