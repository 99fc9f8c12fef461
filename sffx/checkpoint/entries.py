"""The entries of a checkpoint: their names, the values that sffx writes, and their checks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from sffx.blocks import BlockPlan
from sffx.checks import is_number
from sffx.errors import InputError, in_brief
from sffx.net import cut_model, is_cut, plan_of

STATE_KEY = "net"
OPTIMIZER_KEY = "optimizer"
ACCURACY_KEY = "sffx_accuracy"
CUT_KEY = "sffx_cut"
VERSIONS_KEY = "sffx_versions"
LAYERS_KEY = "sffx_layers"
CALLS_KEY = "sffx_calls"
READOUT_KEY = "sffx_readout"
KEYS = (
    STATE_KEY,
    OPTIMIZER_KEY,
    ACCURACY_KEY,
    CUT_KEY,
    VERSIONS_KEY,
    LAYERS_KEY,
    CALLS_KEY,
    READOUT_KEY,
)

# At most this many characters of the arguments of a call are recorded.
_MOST_RECORDED = 200


def own_entries(net: nn.Module, accuracy: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the entries that sffx adds to the weights and the state of the optimizer.

    Raises:
        InputError: an accuracy is no number between 0 and 1.
    """
    entries: dict[str, Any] = {VERSIONS_KEY: versions()}
    if accuracy is not None:
        check_accuracy(accuracy)
        entries[ACCURACY_KEY] = {name: float(value) for name, value in accuracy.items()}
    if is_cut(net):
        entries[CUT_KEY] = with_plain_numbers(plan_of(net).record())
        entries[LAYERS_KEY] = layers_of(cut_model(net).origin.model)
        entries[CALLS_KEY] = calls_of(plan_of(net))
        entries[READOUT_KEY] = cut_model(net).readout.mode
    return entries


def with_plain_numbers(value: Any) -> Any:
    """Return a value with a number of Python for each number of numpy in it, however deep.

    A number of numpy would be a Python object in the file, which the loader refuses. Learning rates
    are such numbers where a schedule computes them by `numpy.cos`.
    """
    return tree_map_only(np.generic, lambda number: number.item(), value)


def layers_of(model: nn.Module) -> dict[str, str]:
    """Return the kind and the options of each layer by its name, as torch prints them."""
    layers = {}
    for name, module in model.named_modules():
        text = f"{type(module).__name__}({module.extra_repr()})"
        # The address of a function is another one in each run.
        if not any(module.children()) and " at 0x" not in text:
            layers[name] = text
    return layers


def note_on_layers(saved: Mapping[str, str] | None, model: nn.Module) -> str:
    """Return a note on layers that were others when a checkpoint was written, "" for none.

    Weights fit a model with another activation, stride or dropout just as well.

    Args:
        saved: the layers in the checkpoint, None where it has no such entry.
        model: that gets the weights.
    """
    if saved is None:
        return ""
    changes = []
    for name, text in layers_of(model).items():
        if saved.get(name, text) != text:
            changes.append(f"{name} was {saved[name]} and is {text}")
    if not changes:
        return ""
    return f"the checkpoint is of a model with other layers: {in_brief(changes, 3)}"


def calls_of(plan: BlockPlan) -> list[str]:
    """Return what the forward of a model calls, in order, each with its arguments.

    "-1" stands for the value of the call before, "-2" for that of the one before it.
    """
    nodes = [node for block in plan.all_blocks for node in block.graph]
    index = {node.name: i for i, node in enumerate(nodes)}
    calls = []
    for i, node in enumerate(nodes):
        # Distances, so that a new call changes the texts of those around it alone.
        reads = [str(index[name] - i) if name in index else name for name in node.reads]
        arguments = _with_values(node.arguments, reads)
        calls.append(f"{node.call}({arguments[:_MOST_RECORDED]})")
    return calls


def _with_values(arguments: str, reads: list[str]) -> str:
    """Return the text of arguments with what a call reads in the places of "%0", "%1"."""
    return re.sub(r"%(\d+)", lambda found: reads[int(found[1])], arguments)


def note_on_calls(saved: Sequence[str] | None, plan: BlockPlan, *, same_versions: bool) -> str:
    """Return a note if the calls were others when a checkpoint was written, "" if not.

    Weights alone do not show it: they also fit a model that calls `F.gelu` instead of `F.relu`.

    Args:
        saved: the calls in the checkpoint, None where it has no such entry.
        plan: of the model that gets the weights, cut in the same places for the same inputs.
        same_versions: whether the packages that traced it are those that wrote the checkpoint.
            Other versions may write the arguments of a call in another way, so only the names of
            what is called are compared.
    """
    if saved is None:
        return ""
    before = [str(call) for call in saved]
    now = calls_of(plan)
    if not same_versions:
        before, now = _called(before), _called(now)
    if before == now:
        return ""
    changes = list(dict.fromkeys(_changes(before, now)))
    return f"the checkpoint is of a model whose forward calls others: {in_brief(changes, 3)}"


def _called(calls: list[str]) -> list[str]:
    """Return the names of what is called, without the arguments."""
    return [call.partition("(")[0] for call in calls]


def _changes(before: list[str], now: list[str]) -> Iterator[str]:
    """Yield how the calls of a forward differ from those before."""
    if len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            if old != new:
                yield f"{old} is {new} now"
        return
    # The calls have no partners, so they are counted.
    old_counts, new_counts = Counter(_called(before)), Counter(_called(now))
    for name in dict.fromkeys([*old_counts, *new_counts]):
        if old_counts[name] != new_counts[name]:
            yield f"{name} was called {old_counts[name]}x and is called {new_counts[name]}x now"


def check_accuracy(accuracy: Any) -> None:
    """Raise an InputError if these are not accuracies by name."""
    if not isinstance(accuracy, Mapping):
        raise InputError(
            f"the entry {ACCURACY_KEY!r} is a {type(accuracy).__name__}, not accuracies by name. "
            "Hint: save sffx.evaluate(net, loader).accuracy"
        )
    for name, value in accuracy.items():
        if not is_number(value) or not 0 <= value <= 1:
            raise InputError(
                f"the entry {ACCURACY_KEY!r} has {value!r} for {name!r}, "
                "not an accuracy between 0 and 1. "
                "Hint: save sffx.evaluate(net, loader).accuracy"
            )


def versions() -> dict[str, str]:
    """Return the versions of sffx and of torch."""
    try:
        own = metadata.version("sffx")
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        own = "unknown"
    return {"sffx": own, "torch": str(torch.__version__)}
