"""How a training went, epoch by epoch: from evaluations that a loop collected, or from the file that Lightning's CSVLogger wrote."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffx.errors import InputError

# What sffx.lightning logs, and what it is here.
LOGGED = {"val_acc": "accuracy", "val_loss": "loss", "lr": "lr"}
KINDS = ("accuracy", "loss", "lr")


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch, by the names of blocks and readouts; empty where nothing is.

    Attributes:
        number: of the epoch, from 0.
        accuracy: between 0 and 1.
        loss: in nats.
        lr: learning rates, by the block's name.
    """

    number: int
    accuracy: Mapping[str, float]
    loss: Mapping[str, float]
    lr: Mapping[str, float]


def epochs(history: Any, rates: Sequence[Mapping[str, float]] | None = None) -> list[Epoch]:
    """Return the epochs of a training.

    Args:
        history: for each epoch what `sffx.evaluate` returned, or a mapping with "accuracy" and, if known, "loss" and "lr", each by name;
            or the path of a metrics.csv, or several such paths, of a training that was resumed.
        rates: the learning rates of each epoch by the block's name, for a history that does not hold them.

    Raises:
        InputError: there is no epoch, or it holds no accuracy, or there are not as many rates as epochs.
    """
    if isinstance(history, (str, os.PathLike)):
        history = [history]
    if isinstance(history, Mapping) or not isinstance(history, Iterable):
        kind = type(history).__name__
        raise InputError(
            f"history is a {kind}, not a list of epochs. Hint: [sffx.evaluate(net, loader), ...], one for each epoch"
        )
    history = list(history)
    files = [Path(entry) for entry in history if isinstance(entry, (str, os.PathLike))]
    found = (
        list(_read(files))
        if files
        else [_epoch(number, entry) for number, entry in enumerate(history)]
    )
    if not found or not any(epoch.accuracy for epoch in found):
        where = f" in {', '.join(map(str, files))}" if files else ""
        raise InputError(
            f"there is no epoch with an accuracy{where}. Hint: [sffx.evaluate(net, loader), ...], or a metrics.csv of SFFModule"
        )
    if rates is None:
        return found
    if len(rates) != len(found):
        raise InputError(
            f"there are {len(rates)} rates for {len(found)} epochs. Hint: one mapping for each epoch, by the block's name"
        )
    return [
        Epoch(epoch.number, epoch.accuracy, epoch.loss, dict(rate))
        for epoch, rate in zip(found, rates, strict=True)
    ]


def _epoch(number: int, entry: Any) -> Epoch:
    values = {
        kind: entry.get(kind, {}) if isinstance(entry, Mapping) else getattr(entry, kind, {})
        for kind in KINDS
    }
    wrong = next((kind for kind, value in values.items() if not isinstance(value, Mapping)), None)
    if wrong is not None or not values["accuracy"]:
        told = f"its {wrong} is a {type(values[wrong]).__name__}" if wrong else "it has no accuracy"
        raise InputError(
            f"epoch {number} of the history is a {type(entry).__name__}, but {told}. "
            'Hint: pass what sffx.evaluate returned, or {"accuracy": {"block_0": 0.9, ...}, "loss": {...}, "lr": {...}}'
        )
    return Epoch(number, **{kind: dict(value) for kind, value in values.items()})


def _read(paths: Iterable[Path]) -> Iterator[Epoch]:
    """The epochs that the files tell of, the last value of each; a later file has the last word."""
    known: dict[int, dict[str, dict[str, float]]] = {}
    for path in paths:
        for number, metric, name, value in _values(path):
            known.setdefault(number, {kind: {} for kind in KINDS})[LOGGED[metric]][name] = value
    for number, values in sorted(known.items()):
        if values["accuracy"]:
            yield Epoch(number, **values)


def _values(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """What a metrics.csv holds of each epoch: its number, "val_acc", "val_loss" or "lr", the name of a readout or block, and the value."""
    if not path.is_file():
        raise InputError(
            f"there is no log {str(path)!r}. Hint: CSVLogger writes metrics.csv into a folder version_0"
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [column for column in (rows[0] if rows else ()) if column]
    # The scores that the net is judged by have no name in the log.
    whole = (
        "ensemble" if any(column.startswith("val_acc/block_") for column in columns) else "model"
    )
    for row in rows:
        for column in columns:
            metric, _, name = column.partition("/")
            if metric in LOGGED and row[column]:
                yield (
                    _number(path, row, "epoch"),
                    metric,
                    name or whole,
                    float(_number(path, row, column, float)),
                )


def _number(path: Path, row: Mapping[str, str], column: str, kind: type = int) -> Any:
    try:
        return kind(row.get(column, ""))
    except (TypeError, ValueError) as cause:
        raise InputError(
            f"{str(path)!r} is no log of Lightning: its column {column!r} holds {row.get(column)!r}, not a number"
        ) from cause
