"""What a deployment must know beside the graph: the names of the classes and how images are normalised.

It travels in the exported file as one JSON object with the keys

- "readout": "ensemble", "last", "classifier", "weighted" or "cumulative";
- "class_names": the names of the J classes in the order of the scores, or null;
- "mean" and "std": by which each channel was normalised in training, `(x - mean) / std`, or null. The graph does not do it.

It is read back from ONNX Runtime, or from a `.pt2` file, by

    session = onnxruntime.InferenceSession("net.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map["sffx"])

    files = {"sffx.json": ""}
    program, told = torch.export.load("net.pt2", extra_files=files), json.loads(files["sffx.json"])
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from sffx.blocks import BlockPlan, Input
from sffx.errors import InputError

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
        InputError: there are not J names, or `mean` and `std` do not fit each other or the channels of an input.
    """
    told = {
        "readout": readout,
        "class_names": _names(class_names, plan.num_classes),
        **_normalisation(plan.inputs, mean, std),
    }
    return json.dumps(told, ensure_ascii=False)


def _names(names: Sequence[str] | None, classes: int) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"class_names is {names!r}. Hint: pass a list of strings, one for each class"
        )
    if len(names) != classes:
        raise InputError(
            f"there are {len(names)} class names, but the model has {classes} classes. Hint: name each class once, in order"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InputError(
            f"the class name {twice!r} is given twice. Hint: name each class once, in order"
        )
    return list(names)


def _normalisation(
    inputs: Sequence[Input], mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict[str, list[float] | None]:
    if mean is None and std is None:
        return {"mean": None, "std": None}
    if mean is None or std is None or len(mean) != len(std):
        raise InputError(
            f"mean is {mean} and std is {std}. Hint: pass both, with a number for each channel"
        )
    found = {"mean": [float(value) for value in mean], "std": [float(value) for value in std]}
    if not all(map(math.isfinite, found["mean"])) or not all(
        0 < value < math.inf for value in found["std"]
    ):
        raise InputError(f"mean is {mean} and std is {std}. Hint: numbers, those of std above 0")
    channels = [each.shape[0] for each in inputs if len(each.shape) > 1]
    if channels and len(mean) not in channels:
        raise InputError(
            f"mean and std have {len(mean)} numbers, but the input has {channels[0]} channels. Hint: a number for each channel"
        )
    return {**found}
