"""The epochs of a training, from evaluations or from the log of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sffx.errors import InputError, shown
from sffx.files import as_path
from sffx.parts import is_block

# The columns that sffx.lightning logs, with their names here.
LOGGED = {"val_acc": "accuracy", "val_loss": "loss", "lr": "lr"}
KINDS = ("accuracy", "loss", "lr")

HINT = "Hint: [sffx.evaluate(net, loader), ...]"


@dataclass(frozen=True)
class Epoch:
    """The figures after an epoch, by the names of blocks and readouts; empty where there are none.

    Attributes:
        number: of the epoch, from 0.
        accuracy: between 0 and 1, or nan.
        loss: of the task; for classes in nats.
        lr: learning rates, by the block's name.
    """

    number: int
    accuracy: Mapping[str, float]
    loss: Mapping[str, float]
    lr: Mapping[str, float]


def epochs(history: Any, rates: Sequence[Mapping[str, float]] | None = None) -> list[Epoch]:
    """Return the epochs of a training.

    Args:
        history: for each epoch what `sffx.evaluate` returned, or a mapping with "accuracy", "loss"
            and "lr", or some of them, each by name. Or the path of a metrics.csv, or several
            such paths of a training that was resumed.
        rates: the learning rates of each epoch by the block's name, for a history without them.

    Raises:
        InputError: there is no epoch, or it holds neither accuracy nor loss, a value is no number,
            an accuracy not between 0 and 1, or there are not as many rates as epochs.
    """
    if isinstance(history, (str, os.PathLike)):
        history = [history]
    entries = _listed(history)
    files = [as_path(entry) for entry in entries if isinstance(entry, (str, os.PathLike))]
    if files and len(files) < len(entries):
        raise InputError(
            f"history holds {len(files)} paths and {len(entries) - len(files)} other entries. "
            "Hint: pass either paths or evaluations"
        )
    if files:
        listed = list(_read(files))
    else:
        listed = [_epoch(number, entry) for number, entry in enumerate(entries)]
    if not any(epoch.accuracy or epoch.loss for epoch in listed):
        where = f" in {', '.join(map(str, files))}" if files else ""
        raise InputError(
            f"there is no epoch with an accuracy or a loss{where}. "
            f"{HINT}, or a metrics.csv of SFFModule"
        )
    if rates is not None:
        listed = _with_rates(listed, rates)
    return [_checked(epoch) for epoch in listed]


def _listed(history: Any) -> list[Any]:
    try:
        # Of a mapping, the keys would be taken for epochs.
        if not isinstance(history, Mapping):
            return list(history)
    except TypeError:
        pass  # it cannot be iterated over, as the error below says
    kind = type(history).__name__
    raise InputError(f"history is a {kind}, not a list of epochs. {HINT}, one for each epoch")


def _checked(epoch: Epoch) -> Epoch:
    """Return an epoch whose values are floats; raise an InputError for one that is no number."""
    checked: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        values = {}
        for name, given in getattr(epoch, kind).items():
            values[name] = _value(given, name, kind, epoch.number)
        checked[kind] = values
    return Epoch(epoch.number, **checked)


def _value(given: Any, name: Any, kind: str, number: int) -> float:
    """Return a value as a float.

    Args:
        given: the value.
        name: of the block or the readout.
        kind: "accuracy", "loss" or "lr".
        number: of the epoch.
    """
    where = f"the {kind} of {name!r} in epoch {number}"
    if not isinstance(name, str):
        raise InputError(f"{where} has no text as its name. Hint: 'block_0', 'ensemble', ...")
    try:
        if isinstance(given, (str, bytes)):
            raise TypeError("matplotlib would take texts for categories")
        value = float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError) as cause:
        raise InputError(
            f"{where} is {shown(given)}. Hint: pass a number, or nan where there is none"
        ) from cause
    if kind == "accuracy" and (value < 0 or value > 1):
        raise InputError(f"{where} is {value:g}, not between 0 and 1. Hint: percent / 100")
    return value


def _with_rates(listed: Sequence[Epoch], rates: Any) -> list[Epoch]:
    is_list = isinstance(rates, Sequence) and not isinstance(rates, str)
    if not is_list or not all(isinstance(rate, Mapping) for rate in rates):
        raise InputError(
            f"rates is {shown(rates)}, no list of mappings. "
            "Hint: [{group['name']: group['lr'] for group in optimizer.param_groups}, ...]"
        )
    if len(rates) != len(listed):
        raise InputError(
            f"there are {len(rates)} rates for {len(listed)} epochs. "
            "Hint: one mapping for each epoch, by the block's name"
        )
    return [replace(epoch, lr=dict(rate)) for epoch, rate in zip(listed, rates, strict=True)]


def _epoch(number: int, entry: Any) -> Epoch:
    """Return an epoch, given what `sffx.evaluate` returned or a mapping with the same names."""
    values: dict[str, Any] = {}
    for kind in KINDS:
        if isinstance(entry, Mapping):
            values[kind] = entry.get(kind, {})
        else:
            values[kind] = getattr(entry, kind, {})
    for kind, value in values.items():
        if not isinstance(value, Mapping):
            raise _no_epoch(number, entry, f"its {kind} is a {type(value).__name__}")
    if not values["accuracy"] and not values["loss"]:
        raise _no_epoch(number, entry, "it has neither accuracy nor loss")
    return Epoch(
        number,
        accuracy=dict(values["accuracy"]),
        loss=dict(values["loss"]),
        lr=dict(values["lr"]),
    )


def _no_epoch(number: int, entry: Any, reason: str) -> InputError:
    return InputError(
        f"epoch {number} of the history is a {type(entry).__name__}, but {reason}. "
        "Hint: pass what sffx.evaluate returned, or "
        '{"accuracy": {"block_0": 0.9, ...}, "loss": {...}, "lr": {...}}'
    )


def _read(paths: Iterable[Path]) -> Iterator[Epoch]:
    """Yield the epochs that files hold.

    If a figure has several values, as after a resumed training, the last value counts.
    """
    # The values by the epoch's number, then by kind, then by name.
    by_number: dict[int, dict[str, dict[str, float]]] = {}
    for path in paths:
        for number, kind, name, value in _values(path):
            of_epoch = by_number.setdefault(number, {each: {} for each in KINDS})
            of_epoch[kind][name] = value
    for number, values in sorted(by_number.items()):
        if values["accuracy"] or values["loss"]:
            yield Epoch(number, **values)


def _values(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield the values of a metrics.csv: the epoch's number, the kind, the name, the value."""
    rows = _rows(path)
    # A column is called "val_acc/block_0". For the scores of the whole net it is "val_acc".
    columns: list[str] = []
    if rows:
        # csv puts cells beyond the header under the key None.
        columns = [column for column in rows[0] if column]
    # Numbers have no accuracy, so any column may name a block.
    has_blocks = any(is_block(column.partition("/")[2]) for column in columns)
    whole = "ensemble" if has_blocks else "model"
    for row in rows:
        for column in columns:
            metric, _, name = column.partition("/")
            # A row of training has no values of validation, and the other way round.
            if metric in LOGGED and row[column]:
                number = _number(path, row, "epoch", int)
                value = _number(path, row, column, float)
                yield number, LOGGED[metric], name or whole, value


def _rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a log: the cells by the names of their columns.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise InputError(
            f"there is no log {str(path)!r}. "
            "Hint: CSVLogger writes metrics.csv into a folder version_0"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        raise InputError(
            f"{str(path)!r} cannot be read as a log: {cause}. Hint: pass a metrics.csv of CSVLogger"
        ) from cause


def _number(path: Path, row: Mapping[str, str], column: str, kind: type) -> Any:
    """Return a cell of a log as a number of a kind, `int` or `float`."""
    try:
        return kind(row.get(column, ""))
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"{str(path)!r} is no log of Lightning: "
            f"its column {column!r} holds {row.get(column)!r}, not a number"
        ) from cause
