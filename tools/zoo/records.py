"""The result for one model, as it is kept in a file."""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from sffx.files import write
from tools.zoo.entries import Entry


@dataclass
class Record:
    """The result for one model.

    Attributes:
        reason: why the model is not verified; empty where it is.
        outcome: "verified"; "refused", with a helpful error; "wrong"; or "idle", where the model
            itself does not run, so that nothing was verified.
        leaves: of each leaf its class, its share of the parameters, and the reason.
        poor: each block and each leaf with more than a third of the parameters, and its share. None
            where that was not counted.
    """

    zoo: str
    name: str
    group: str
    reason: str = "not finished"
    outcome: str = ""
    parameters: int = 0
    blocks: int = 0
    leaves: list[tuple[str, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    input: str = ""
    onnx: bool = False
    poor: list[str] | None = None
    seconds: float = 0.0
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Older records hold no outcome.
        if not self.outcome:
            self.outcome = "wrong" if self.reason else "verified"

    @property
    def is_good(self) -> bool:
        """Whether the model is verified, and well cut as far as that was counted."""
        return self.outcome == "verified" and not self.poor

    def finish(self, outcome: str, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        # Reasons quote file names, and the folders of one machine are of no use to others.
        text = re.sub(r"/[^\s\"]*/(site-packages|build/zoo/[^/]*)/", "", text)
        write(path, f"{text}\n".encode())


def new_record(entry: Entry, reason: str = "not finished") -> Record:
    versions = {}
    for package in ("torch", entry.zoo):
        versions[package] = importlib.metadata.version(package)
    today = date.today().isoformat()
    return Record(entry.zoo, entry.name, entry.group, reason, date=today, versions=versions)


def read(path: Path) -> Record:
    return Record(**json.loads(path.read_text()))


def is_open(path: Path, failed: bool) -> bool:
    """Whether there is no record yet; with `failed`, a record of a failure counts as none."""
    return not path.exists() or (failed and bool(json.loads(path.read_text())["reason"]))
