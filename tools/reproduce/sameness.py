"""Whether what was made before is of the experiment that is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tools.reproduce.experiments import Experiment, Recipe


def require_same(
    place: Path,
    config: Mapping[str, Any],
    method: str,
    experiment: Experiment,
    leaving_out: Sequence[str] = (),
) -> None:
    """Check that a record or a checkpoint is of the experiment as it is asked for.

    Args:
        place: of the record, for the message.
        config: the fields of the experiment that it was made with.
        method: that trained.
        experiment: as it is asked for.
        leaving_out: fields that may differ.

    Raises:
        SystemExit: it is of another one; names the differences.
    """
    # Older records lack the fields that came later, and were made with their defaults.
    defaults = {each.name: each.default for each in fields(Experiment)}
    recorded = _told_apart(Experiment(**{**defaults, **config}), method)
    differences = []
    for key, value in _told_apart(experiment, method).items():
        if recorded[key] != value and key not in leaving_out:
            differences.append(f"{key} {recorded[key]!r} instead of {value!r}")
    refuse(place, differences)


def refuse(place: Path, differences: Sequence[str]) -> None:
    """End with the differences, if there are any.

    Raises:
        SystemExit: there are some.
    """
    if differences:
        raise SystemExit(
            f"{place} was made with {', '.join(differences)}. "
            "Hint: another --out and --runs for another experiment"
        )


def _told_apart(experiment: Experiment, method: str) -> dict[str, Any]:
    """Return what the record of a method depends on, as JSON: all but the other methods."""
    config = asdict(experiment)
    del config["methods"]
    recipe = dict(config["recipes"]).get(method)
    config["recipes"] = None if recipe is None else asdict(Recipe(**recipe))
    return json.loads(json.dumps(config))
