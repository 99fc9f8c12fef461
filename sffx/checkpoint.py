"""Checkpoints: the one place that writes them and the one that reads them.

A checkpoint is a mapping in a file of `torch.save`. Its entries are

- "net": the state dict of the model;
- "optimizer": the state dict of the optimizer;
- "sffx_accuracy": the accuracy of each readout, as `sffx.evaluate(net, loader).accuracy`;
- "sffx_cut": how the model was cut, as `net.plan.record()`; plain models have none;
- "sffx_versions": the versions of sffx and of torch that wrote the file;
- any other entry that the training wants to keep.

The reader also accepts checkpoints of Lightning and files with nothing but a state dict.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from sffx.api import transform
from sffx.blocks import Options
from sffx.compiler.analyse import Analysis
from sffx.compiler.policies import Cuts, Policy, named
from sffx.errors import InputError, in_brief
from sffx.export.explain import first_line
from sffx.files import writing
from sffx.net import is_cut, plan_of
from sffx.parts import block_name
from sffx.runtime.shard import require_whole

STATE_KEY = "net"
OPTIMIZER_KEY = "optimizer"
ACCURACY_KEY = "sffx_accuracy"
CUT_KEY = "sffx_cut"
VERSIONS_KEY = "sffx_versions"
KEYS = (STATE_KEY, OPTIMIZER_KEY, ACCURACY_KEY, CUT_KEY, VERSIONS_KEY)

# Where other training scripts keep the state dict; the first is Lightning's.
OTHER_STATE_KEYS = ("state_dict", "model_state_dict", "model")
LIGHTNING_OPTIMIZERS_KEY = "optimizer_states"

# The arguments of `transform` that a cut model cannot be made again without.
REQUIRED_OPTIONS = ("policy", "example_input", "goodness", "norm")

# Those that a caller may give as a callable; then the record has its name only.
CALLABLE_OPTIONS = ("goodness", "norm")

FIRST_BLOCK = f"{block_name(0)}."

# How torch reports a file that it did not write, whatever the file holds.
NOT_OF_TORCH = ("Unsupported operand", "invalid load key")


def save_checkpoint(
    path: str | os.PathLike[str],
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    accuracy: Mapping[str, float] | None = None,
    **more: Any,
) -> Path:
    """Write a checkpoint that `load_checkpoint`, `sffx-viz` and `sffx-export` read.

    The file is replaced as a whole. If anything fails, an older file stays as it was.

    Args:
        path: of the file.
        net: what `sffx.transform` returned, or a plain model.
        optimizer: whose state is saved.
        accuracy: of each readout, between 0 and 1, as `sffx.evaluate(net, loader).accuracy`.
        more: further entries, such as `epoch=3`: tensors, numbers, strings and containers of these.

    Returns:
        The path of the file.

    Raises:
        InputError: `net` is sharded, an entry cannot be saved, or the file cannot be written.
        ExportError: the file system failed while the file was written.
    """
    model = _unwrapped(net)
    require_whole(model)
    for name, value in more.items():
        _check_further_entry(name, value)
    content = {STATE_KEY: model.state_dict(), **entries(model, accuracy)}
    if optimizer is not None:
        content[OPTIMIZER_KEY] = optimizer.state_dict()
    content.update(more)
    with writing(path) as draft:
        torch.save(content, draft)
    return Path(path)


def entries(net: nn.Module, accuracy: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the entries that make a mapping with weights a checkpoint of sffx.

    Raises:
        InputError: an accuracy is no number between 0 and 1.
    """
    found: dict[str, Any] = {VERSIONS_KEY: _versions()}
    if accuracy is not None:
        _check_accuracy(accuracy)
        found[ACCURACY_KEY] = {name: float(value) for name, value in accuracy.items()}
    if is_cut(net):
        found[CUT_KEY] = plan_of(net).record()
    return found


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU.

    Attributes:
        path: of the file.
        state: the weights by the names that the trained model has for them; empty if there are none.
        optimizer: the state dict of the optimizer, None if there is none.
        accuracy: of each readout, between 0 and 1; empty if none was saved.
        cut: how the model was cut, as `net.plan.record()`; None if the file does not say so.
        versions: of the packages that wrote the file; empty if it does not say so.
        more: all other entries.
        whole: the model itself, where it was saved as a whole and the file was trusted.
    """

    path: Path
    state: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    cut: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    whole: nn.Module | None = None

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the optimizer's groups that have a name, as a block's group has."""
        groups = [] if self.optimizer is None else self.optimizer.get("param_groups", ())
        named = [group for group in groups if "name" in group and "lr" in group]
        return {str(group["name"]): float(group["lr"]) for group in named}

    def net(self, model: nn.Module | None = None, **options: Any) -> fx.GraphModule:
        """Return the cut model that was saved.

        Args:
            model: the plain model; it is copied, cut as the trained one was, and filled with its
                weights. A model that was saved as a whole needs none.
            options: arguments of `sffx.transform`. They win over what the checkpoint says. Without
                a record in the checkpoint, `policy`, `example_input`, `goodness` and `norm` are
                required. A goodness or norm of your own must be passed again.

        Raises:
            InputError: the model or an option is missing, or the weights do not fit.
            SffxError: the model cannot be cut.
        """
        if self.whole is not None:
            return self._whole_net(model, options)
        self.require_weights()
        if model is None:
            raise InputError(
                f"{self._name} holds weights without their model. "
                "Hint: pass the model, as in checkpoint.net(model)"
            )
        net = transform(model, **self.options(**options))
        self._fill(net)
        return net

    def options(self, **given: Any) -> dict[str, Any]:
        """Return the arguments by which `sffx.transform` cuts the model as it was cut.

        Args:
            given: arguments that win over what the checkpoint says.

        Raises:
            InputError: neither says one of those that are required.
        """
        missing = self.missing(given)
        if missing:
            hints = [f"{name}={value}" for name, value in missing.items()]
            raise InputError(
                f"{self._name} does not say all of how its model was cut. "
                f"Hint: pass {', '.join(hints)} as in the training; "
                "sffx.save_checkpoint records them"
            )
        return {**self._recorded_options(), **given}

    def missing(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the required options that neither the checkpoint nor the caller says.

        Args:
            given: the options that the caller has.

        Returns:
            What to pass, by the option's name.
        """
        known = {**self._recorded_options(), **given}
        names = [name for name in REQUIRED_OPTIONS if name not in known]
        return {name: self._expected(name) for name in names}

    def _expected(self, option: str) -> str:
        """Return the name of the callable that the training used, "..." if it is not known."""
        return "..." if self.cut is None else str(self.cut[option])

    def _recorded_options(self) -> dict[str, Any]:
        """Return the arguments of `transform` that the record has."""
        if self.cut is None:
            return {}
        options = {
            "policy": _recorded_policy(self.cut),
            "example_input": _recorded_example(self.cut),
            "num_classes": self.cut["num_classes"],
            "kernel_size": self.cut["kernel_size"],
        }
        for name in CALLABLE_OPTIONS:
            if name not in self.cut["custom"]:
                options[name] = self.cut[name]
        return options

    def _whole_net(self, model: nn.Module | None, options: Mapping[str, Any]) -> fx.GraphModule:
        unused = [*(["model"] if model is not None else []), *options]
        if unused:
            raise InputError(
                f"{self._name} holds a whole model, which is cut already, "
                f"so {', '.join(unused)} would be passed over. Hint: leave it out"
            )
        assert self.whole is not None
        plan_of(self.whole)
        assert isinstance(self.whole, fx.GraphModule)  # what carries a plan is one
        return self.whole

    def require_weights(self) -> None:
        if any(name.startswith(FIRST_BLOCK) for name in self.state):
            return
        names = in_brief([str(name) for name in self.state], 3) or "none at all"
        raise InputError(
            f"{self._name} holds no weights of a cut model, but {names}. "
            "Hint: save what sffx.transform returned, with sffx.save_checkpoint(path, net)"
        )

    def _fill(self, net: fx.GraphModule) -> None:
        try:
            net.load_state_dict(self.state)
        except RuntimeError as error:
            plan = plan_of(net)
            raise InputError(
                f"the weights of {self._name} do not fit {plan.model}, cut by {plan.policy!r}: "
                f"{_first_mismatches(error)}. "
                "Hint: model, policy, goodness, input and classes must be those of the training"
            ) from error

    @property
    def _name(self) -> str:
        return repr(str(self.path))


def load_checkpoint(path: str | os.PathLike[str], *, trust: bool = False) -> Checkpoint:
    """Return what a checkpoint holds.

    It reads files of `save_checkpoint`, of Lightning with `sffx.lightning`, and of
    `torch.save(net.state_dict(), path)`.

    Args:
        path: of the file.
        trust: whether the file may hold Python objects. Loading these runs code from the file.

    Raises:
        InputError: there is no such file, it is no checkpoint, one of its entries is wrong, or it
            holds Python objects and is not trusted.
    """
    path = Path(path)
    content = _read(path, trust)
    if isinstance(content, nn.Module):
        return Checkpoint(path, content.state_dict(), whole=content)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{str(path)!r} holds a {type(content).__name__}, not weights by name. "
            "Hint: sffx.save_checkpoint(path, net) writes checkpoints"
        )
    try:
        return _checkpoint(path, content)
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error


def _checkpoint(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """Return a mapping's entries in their places, each checked.

    Raises:
        InputError: an entry is wrong.
    """
    rest = dict(content)
    state = _take_state(rest)
    optimizer = _take_optimizer(rest)
    accuracy = rest.pop(ACCURACY_KEY, {})
    _check_accuracy(accuracy)
    cut = rest.pop(CUT_KEY, None)
    if cut is not None:
        _check_cut(cut)
    versions = rest.pop(VERSIONS_KEY, {})
    return Checkpoint(path, state, optimizer, accuracy, cut, versions, rest)


def _take_state(content: dict[str, Any]) -> Mapping[str, Any]:
    """Remove the state dict from a checkpoint's content and return it."""
    for key in (STATE_KEY, *OTHER_STATE_KEYS):
        if isinstance(content.get(key), Mapping):
            return _without_prefix(content.pop(key))
    # A file of `torch.save(net.state_dict(), path)` is the state dict itself.
    state = {}
    for name, value in list(content.items()):
        if isinstance(value, Tensor):
            state[name] = content.pop(name)
    return _without_prefix(state)


def _without_prefix(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights by the names that the cut model has for them.

    Lightning puts "net." before these names, and DistributedDataParallel "module.".
    """
    prefix = _prefix(state)
    if not prefix:
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _prefix(names: Iterable[str]) -> str:
    """Return what stands before the name of the first block in all names, "" if nothing does."""
    for name in names:
        prefix, block, _ = name.partition(FIRST_BLOCK)
        if block:
            return prefix if all(each.startswith(prefix) for each in names) else ""
    return ""


def _take_optimizer(content: dict[str, Any]) -> Mapping[str, Any] | None:
    """Remove the state of the optimizer from a checkpoint's content and return it."""
    optimizer = content.pop(OPTIMIZER_KEY, None)
    of_lightning = content.get(LIGHTNING_OPTIMIZERS_KEY)
    if optimizer is None and isinstance(of_lightning, Sequence) and len(of_lightning) == 1:
        optimizer = content.pop(LIGHTNING_OPTIMIZERS_KEY)[0]
    if optimizer is not None and not isinstance(optimizer, Mapping):
        raise InputError(
            f"the entry {OPTIMIZER_KEY!r} is a {type(optimizer).__name__}, not a state dict. "
            "Hint: save optimizer.state_dict()"
        )
    return optimizer


def _recorded_policy(cut: Mapping[str, Any]) -> Policy:
    """Return a policy that cuts where the model was cut, under the name of the one that chose."""
    cuts = Cuts(tuple(cut["after"]))

    def policy(analysis: Analysis, options: Options) -> Cuts:
        return cuts

    return named(policy, cut["policy"])


def _recorded_example(cut: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an example batch of one sample, by the names of the model's inputs."""
    example = {}
    for name, each in cut["inputs"].items():
        example[name] = torch.zeros(1, *each["shape"], dtype=getattr(torch, each["dtype"]))
    return example


def _read(path: Path, trust: bool) -> Any:
    """Return what a file of `torch.save` holds, on the CPU.

    Raises:
        InputError: there is no such file, it is no checkpoint, or it holds Python objects and is
            not trusted.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder. Hint: name the file in it")
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        raise InputError(f"{str(path)!r} {_why_unreadable(error, trust)}") from error


def _why_unreadable(error: Exception, trust: bool) -> str:
    """Return why `torch.load` failed, and a hint; the name of the file goes before it."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"cannot be loaded: {first_line(error)}. "
            "Hint: run the command where the code of the model lies, or install it"
        )
    if isinstance(error, EOFError):
        return "is no checkpoint of torch: it is empty, or ends too early"
    if not isinstance(error, pickle.UnpicklingError):
        return (
            f"cannot be loaded: {type(error).__name__}: {first_line(error)}. "
            "Hint: is the file whole, and did torch.save write it?"
        )
    if trust or any(sign in str(error) for sign in NOT_OF_TORCH):
        return "is no checkpoint of torch"
    return (
        "holds Python objects, not weights alone, and loading it would run code that lies in it. "
        "Hint: sffx.save_checkpoint saves without them; if you know where the file comes from, "
        "trust it: load_checkpoint(path, trust=True), sffx-export --trust"
    )


def _unwrapped(net: nn.Module) -> nn.Module:
    """Return the model itself, whose names in the state dict have no prefix."""
    while isinstance(net, DistributedDataParallel):
        net = net.module
    compiled: nn.Module = getattr(net, "_orig_mod", net)  # of torch.compile
    return compiled


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("sffx")
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        own = "unknown"
    return {"sffx": own, "torch": str(torch.__version__)}


def _check_further_entry(name: str, value: Any) -> None:
    """Raise an InputError if `load_checkpoint` could not read an entry."""
    if name in KEYS:
        raise InputError(f"save_checkpoint writes the entry {name!r} itself. Hint: rename yours")
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise InputError(
            f"the entry {name!r} holds Python objects, which load_checkpoint would not read. "
            "Hint: save tensors, numbers, strings, and lists and mappings of these"
        ) from error


def _check_accuracy(accuracy: Any) -> None:
    """Raise an InputError if these are not accuracies by name."""
    if not isinstance(accuracy, Mapping):
        raise InputError(
            f"the entry {ACCURACY_KEY!r} is a {type(accuracy).__name__}, not accuracies by name. "
            "Hint: save sffx.evaluate(net, loader).accuracy"
        )
    for name, value in accuracy.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(
                f"the entry {ACCURACY_KEY!r} has {value!r} for {name!r}, not an accuracy between 0 and 1. "
                "Hint: save sffx.evaluate(net, loader).accuracy"
            )


def _check_cut(cut: Any) -> None:
    """Raise an InputError that names the first entry that `BlockPlan.record` does not write."""
    hint = "Hint: sffx.save_checkpoint writes it, or save net.plan.record() there"
    if not isinstance(cut, Mapping):
        raise InputError(f"the entry {CUT_KEY!r} is a {type(cut).__name__}, not a mapping. {hint}")
    for name, (is_right, expected) in CUT_ENTRIES.items():
        if name not in cut:
            raise InputError(f"the entry {CUT_KEY!r} lacks {name!r}, {expected}. {hint}")
        if not is_right(cut[name]):
            raise InputError(
                f"the entry {CUT_KEY!r} has {cut[name]!r} for {name!r}, not {expected}. {hint}"
            )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_name, value))


def _are_callables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and set(value) <= set(CALLABLE_OPTIONS)


def _are_inputs(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(_is_name(name) and _is_input(each) for name, each in value.items())


def _is_input(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"shape", "dtype"} <= set(value):
        return False
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(shape, (list, tuple)) or not all(map(_is_positive, shape)):
        return False
    return _is_name(dtype) and isinstance(getattr(torch, dtype, None), torch.dtype)


# The entries of `BlockPlan.record`, with a test and a description of each.
CUT_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "policy": (_is_name, "the name of a policy"),
    "after": (_are_names, "the names of the nodes after which the model was cut"),
    "inputs": (_are_inputs, "the shape and the dtype of each input by name"),
    "num_classes": (_is_positive, "the number of classes"),
    "goodness": (_is_name, "the name of a goodness"),
    "kernel_size": (_is_positive, "the kernel size of the heads"),
    "norm": (_is_name, "the name of a norm"),
    "custom": (_are_callables, "which of goodness and norm are callables"),
}


def _first_mismatches(error: RuntimeError) -> str:
    """Return the first names in a complaint of `load_state_dict`."""
    complaint = " ".join(str(error).splitlines()[1:2]).strip(" \t.")
    return in_brief(complaint.split(", "), 3)
