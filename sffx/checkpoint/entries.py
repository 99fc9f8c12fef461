"""The entries of a checkpoint: their names, the values that sffx writes, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

from sffx.errors import InputError, in_brief
from sffx.net import cut_model, is_cut, plan_of

STATE_KEY = "net"
OPTIMIZER_KEY = "optimizer"
ACCURACY_KEY = "sffx_accuracy"
CUT_KEY = "sffx_cut"
VERSIONS_KEY = "sffx_versions"
LAYERS_KEY = "sffx_layers"
KEYS = (STATE_KEY, OPTIMIZER_KEY, ACCURACY_KEY, CUT_KEY, VERSIONS_KEY, LAYERS_KEY)


def own_entries(net: nn.Module, accuracy: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the entries that sffx adds to the weights and the state of the optimizer.

    Raises:
        InputError: an accuracy is no number between 0 and 1.
    """
    entries: dict[str, Any] = {VERSIONS_KEY: _versions()}
    if accuracy is not None:
        check_accuracy(accuracy)
        # A number of numpy would be a Python object in the file, which the loader refuses.
        entries[ACCURACY_KEY] = {name: float(value) for name, value in accuracy.items()}
    if is_cut(net):
        entries[CUT_KEY] = plan_of(net).record()
        entries[LAYERS_KEY] = layers_of(cut_model(net).origin.model)
    return entries


def layers_of(model: nn.Module) -> dict[str, str]:
    """Return the kind and the options of each layer by its name, as torch prints them."""
    layers = {}
    for name, module in model.named_modules():
        text = f"{type(module).__name__}({module.extra_repr()})"
        # The address of a function is another one in each run.
        if not any(module.children()) and " at 0x" not in text:
            layers[name] = text
    return layers


def note_on_layers(saved: Any, model: nn.Module) -> str:
    """Return a note on layers that were others when a checkpoint was written, "" for none.

    Weights fit a model with another activation, stride or dropout just as well.

    Args:
        saved: the layers in the checkpoint, None where it has no such entry.
        model: that gets the weights.
    """
    if not isinstance(saved, Mapping):
        return ""
    changes = []
    for name, text in layers_of(model).items():
        if saved.get(name, text) != text:
            changes.append(f"{name} was {saved[name]} and is {text}")
    if not changes:
        return ""
    return f"the checkpoint is of a model with other layers: {in_brief(changes, 3)}"


def check_accuracy(accuracy: Any) -> None:
    """Raise an InputError if these are not accuracies by name."""
    if not isinstance(accuracy, Mapping):
        raise InputError(
            f"the entry {ACCURACY_KEY!r} is a {type(accuracy).__name__}, not accuracies by name. "
            "Hint: save sffx.evaluate(net, loader).accuracy"
        )
    for name, value in accuracy.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(
                f"the entry {ACCURACY_KEY!r} has {value!r} for {name!r}, "
                "not an accuracy between 0 and 1. "
                "Hint: save sffx.evaluate(net, loader).accuracy"
            )


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("sffx")
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        own = "unknown"
    return {"sffx": own, "torch": str(torch.__version__)}
