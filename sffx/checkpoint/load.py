"""Read a checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sffx.api import transform
from sffx.blocks import option_name
from sffx.checkpoint.content import (
    FIRST_BLOCK,
    take_optimizer,
    take_state,
    take_texts,
    wrong_entry,
)
from sffx.checkpoint.cut import check_cut, recorded_options
from sffx.checkpoint.entries import (
    ACCURACY_KEY,
    CALLS_KEY,
    CUT_KEY,
    LAYERS_KEY,
    READOUT_KEY,
    STATE_KEY,
    VERSIONS_KEY,
    check_accuracy,
    note_on_calls,
    note_on_layers,
    versions,
)
from sffx.checkpoint.read import read
from sffx.checks import require_flag
from sffx.errors import InputError, in_brief
from sffx.files import as_path
from sffx.learning.objectives.records import OBJECTIVES, objective_named, objective_of_record
from sffx.learning.readouts import Mode, require_readout
from sffx.net import CutModel, cut_model, left_over_tensors, plan_of, set_plan
from sffx.objective import DEFAULT, Objective
from sffx.tensors import name_on_meta

# The arguments of `transform` that must be known to cut a model again as it was cut.
REQUIRED_OPTIONS = ("policy", "example_input", "goodness", "norm")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, on the CPU.

    Attributes:
        path: of the file.
        state: the weights, by their names in the trained model; may be empty.
        accuracy: of each readout, between 0 and 1; empty if none was saved.
        cut: how the model was cut, as `net.plan.record()`; None if the file has no record.
        versions: of the packages that wrote the file; empty if the file has none.
        more: all other entries.
        whole: the model itself, where it was saved as a whole and the file was trusted.
        layers: of the model that was cut, by name; None if the file does not have them.
        calls: what the forward of that model calls; None if the file does not have them.
        readout: of the cut model, `net.readout.mode`; None if the file does not name it.
    """

    path: Path
    state: Mapping[str, Any] = field(default_factory=dict)
    _optimizer: dict[str, Any] | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    cut: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    whole: nn.Module | None = None
    layers: Mapping[str, str] | None = None
    calls: Sequence[str] | None = None
    readout: Mode | None = None

    @property
    def optimizer(self) -> dict[str, Any] | None:
        """The state dict of the optimizer, None if there is none.

        Each time it is a copy: an optimizer on the CPU goes on in the memory of what it loads, so
        that a second run from the same checkpoint would begin where the first one has ended.
        """
        return copy.deepcopy(self._optimizer)

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the optimizer's groups by name; `parameter_groups` names them."""
        if self._optimizer is None:
            return {}
        rates = {}
        for group in self._optimizer.get("param_groups", ()):
            if "name" in group and "lr" in group:
                rates[str(group["name"])] = float(group["lr"])
        return rates

    def net(self, model: nn.Module | None = None, **options: Any) -> CutModel:
        """Return the cut model that was saved, with weights of the dtypes that they had.

        Args:
            model: the plain model; it is copied, cut as the trained one was, and filled with its
                weights. A model that was saved as a whole needs none.
            options: arguments of `sffx.transform`. They win over the record. Without a record,
                `policy`, `example_input`, `goodness` and `norm` are required. A goodness or norm
                of your own must be passed again.

        Raises:
            InputError: the model or an option is missing, the model is on the meta device, or the
                weights do not fit.
            SffxError: the model cannot be cut.
        """
        if self.whole is not None:
            self._refuse_for_whole(model, options)
            return self._whole_net(self.whole)
        self.require_weights()
        if model is None:
            raise InputError(
                f"{self._name} holds weights without their model. "
                "Hint: pass the model, as in checkpoint.net(model)"
            )
        _require_on_device(model)
        net = transform(model, **self.options(**options))
        self._fill(net)
        return net

    def options(self, **given: Any) -> dict[str, Any]:
        """Return the arguments by which `sffx.transform` cuts the model as it was cut.

        Args:
            given: arguments that win over the record. The name of the recorded objective stands for
                it with the recorded options.

        Raises:
            InputError: a required argument is neither recorded nor given.
        """
        missing = self.missing(given)
        if missing:
            hints = [f"{name}={value}" for name, value in missing.items()]
            raise InputError(
                f"{self._name} does not record all of how its model was cut. "
                f"Hint: pass {', '.join(hints)} as in the training; "
                "sffx.save_checkpoint records them"
            )
        self._require_heads_of(given)
        recorded = self._recorded_options()
        objective = recorded.get("objective")
        if objective is not None and given.get("objective") == objective.name:
            # By the name alone it would lose its options, such as where labels are put.
            given["objective"] = objective
        return {**recorded, **given}

    def _require_heads_of(self, given: Mapping[str, Any]) -> None:
        """Raise an InputError if another objective is given, whose heads are none of these."""
        if self.cut is None or "objective" not in given or "goodness" in given:
            return
        record = self.cut.get("objective", DEFAULT.record())
        asked = objective_named(given["objective"])
        if asked.name == record["name"] or record["name"] not in OBJECTIVES:
            return
        if asked.goodness is None or objective_of_record(record).goodness is None:
            raise InputError(
                f"{self._name} holds heads of the objective {record['name']!r}, and "
                f"{asked.name!r} is given, which has others. Hint: leave the objective out; "
                "sffx.extract(checkpoint.net(model)) gives the model alone, which may be cut anew"
            )

    def missing(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the required options that are neither recorded nor given.

        Args:
            given: the options that the caller has.

        Returns:
            A text that says what to pass, by the option's name.
        """
        available = {**self._recorded_options(), **self._defaults(given), **given}
        names = [name for name in REQUIRED_OPTIONS if name not in available]
        has_objective = self.cut is not None and "objective" in self.cut
        if has_objective and "objective" not in available:
            names.append("objective")
        return {name: self._expected(name) for name in names}

    def _expected(self, option: str) -> str:
        """Return the name of the callable that the training used, "..." if it is not known."""
        if self.cut is None:
            return "..."
        # A checked record lacks only callables and objectives of one's own, and has their names.
        own = self.cut[option]
        return str(own["name"] if option == "objective" else own)

    def _defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the callables that the cut had from its objective, where that is given again."""
        objective = given.get("objective")
        if self.cut is None or not isinstance(objective, Objective):
            return {}
        defaults = {}
        for name in self.cut["custom"]:
            own = getattr(objective, name)
            if callable(own) and option_name(own) == self.cut[name]:
                defaults[name] = own
        return defaults

    def _recorded_options(self) -> dict[str, Any]:
        if self.cut is None:
            return {}
        return recorded_options(self.cut)

    def _refuse_for_whole(self, model: nn.Module | None, options: Mapping[str, Any]) -> None:
        unused = list(options) if model is None else ["model", *options]
        if unused:
            raise InputError(
                f"{self._name} holds a whole model, which is cut already, "
                f"so {', '.join(unused)} would be passed over. Hint: leave it out"
            )

    def _whole_net(self, whole: nn.Module) -> CutModel:
        try:
            return cut_model(whole)
        except InputError as error:
            raise InputError(
                f"{self._name} holds a {type(whole).__name__}, which is not cut. "
                "Hint: save what sffx.transform returned"
            ) from error

    def require_weights(self) -> None:
        """Raise an InputError if the checkpoint holds no weights of a cut model."""
        if any(name.startswith(FIRST_BLOCK) for name in self.state):
            return
        names = in_brief([str(name) for name in self.state], 3) or "none at all"
        raise InputError(
            f"{self._name} holds no weights of a cut model, but {names}. "
            "Hint: save what sffx.transform returned, with sffx.save_checkpoint(path, net)"
        )

    def _fill(self, net: CutModel) -> None:
        _take_dtypes(net, self.state)
        try:
            net.load_state_dict(self.state)
        except RuntimeError as error:
            plan = plan_of(net)
            raise InputError(
                f"the weights of {self._name} do not fit {plan.model}, cut by {plan.policy!r}: "
                f"{_first_mismatches(error)}. "
                "Hint: model, policy, goodness, input and classes must be those of the training"
            ) from error
        if self.readout is not None:
            net.readout.mode = self.readout
        notes = [note_on_layers(self.layers, net.origin.model), self._note_on_calls(net)]
        notes = [note for note in notes if note]
        if notes:
            set_plan(net, replace(net.plan, notes=(*net.plan.notes, *notes)))

    def _note_on_calls(self, net: CutModel) -> str:
        """Return a note on what the forward of another model calls, "" where nothing differs."""
        record = net.plan.record()
        for entry in ("inputs", "after"):
            # A trace for other inputs, or with other cuts, may list other calls.
            if self.cut is None or record[entry] != self.cut[entry]:
                return ""
        same_versions = dict(self.versions) == versions()
        return note_on_calls(self.calls, net.plan, same_versions=same_versions)

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
    path = as_path(path)
    require_flag("trust", trust)
    content = read(path, trust)
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
    """Return the checkpoint that a file's mapping holds, with its entries checked.

    Raises:
        InputError: an entry is wrong.
    """
    # Each entry is taken out, so that the user's own entries are left over.
    more = dict(content)
    is_own = STATE_KEY in content
    state = take_state(more)
    optimizer = take_optimizer(more, is_own=is_own)
    accuracy = more.pop(ACCURACY_KEY, {})
    check_accuracy(accuracy)
    cut = more.pop(CUT_KEY, None)
    if cut is not None:
        check_cut(cut)
    written_by = take_texts(more, VERSIONS_KEY, "versions by the package's name") or {}
    layers = take_texts(more, LAYERS_KEY, "layers by their names")
    calls = more.pop(CALLS_KEY, None)
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise wrong_entry(CALLS_KEY, calls, "a list of calls")
    readout = more.pop(READOUT_KEY, None)
    if readout is not None:
        require_readout(readout)
    return Checkpoint(
        path=path,
        state=state,
        _optimizer=optimizer,
        accuracy=accuracy,
        cut=cut,
        versions=written_by,
        more=more,
        layers=layers,
        calls=calls,
        readout=readout,
    )


def _require_on_device(model: Any) -> None:
    """Raise an InputError if a model is on the meta device, where it cannot take weights."""
    if not isinstance(model, nn.Module):
        return  # transform says what is wrong
    name = name_on_meta(model)
    if name:
        raise InputError(
            f"{name} of the model is on the meta device, where it cannot take the weights of a "
            "checkpoint. Hint: make the model on the CPU"
        )


def _take_dtypes(net: CutModel, state: Mapping[str, Any]) -> None:
    """Give the floats of a net the dtypes that they have in a state dict.

    torch casts what it loads to the dtypes of the model. So a net that was trained in float64
    would lose digits, and one in bfloat16 would go on in float32.
    """
    own = net.state_dict(keep_vars=True)
    # For each dtype that the net has, those in which its tensors were saved.
    dtypes_saved: dict[torch.dtype, set[torch.dtype]] = {}
    dtype_of: dict[int, torch.dtype] = {}  # as it was saved, by the `id` of a tensor of the net
    for name, tensor in own.items():
        value = state.get(name)
        if not isinstance(value, Tensor) or not isinstance(tensor, Tensor):
            continue
        if tensor.is_floating_point() and value.is_floating_point():
            dtypes_saved.setdefault(tensor.dtype, set()).add(value.dtype)
            dtype_of[id(tensor)] = value.dtype
    for tensor in (*net.parameters(), *net.buffers(), *left_over_tensors(net)):
        # What is not saved, such as some buffers and unused layers, changes like what is.
        others = dtypes_saved.get(tensor.dtype, set())
        like_others = next(iter(others)) if len(others) == 1 else tensor.dtype
        tensor.data = tensor.data.to(dtype_of.get(id(tensor), like_others))


def _first_mismatches(error: RuntimeError) -> str:
    """Return the first names in an error of `load_state_dict`."""
    # The first line of the error names the class only. The second line lists the names.
    lines = str(error).splitlines()
    names = "".join(lines[1:2]).strip(" \t.")
    return in_brief(names.split(", "), 3)
