"""The command `python -m tools.zoo`."""

from __future__ import annotations

import argparse
import sys

import tools.zoo
from tools.options import at_least
from tools.zoo.entries import RESULTS, ZOOS, Entry, entries
from tools.zoo.install import NotInstalled, add_folders, install, is_installed, require
from tools.zoo.records import Record, is_open, new_record, read
from tools.zoo.sweep import sweep
from tools.zoo.table import table


def main() -> None:
    options = _parser().parse_args()
    add_folders()
    if not options.table:
        try:
            sweep(_todo(options), options.jobs, options.limit)
        except NotInstalled as failure:
            sys.exit(f"zoo: {failure}")
    records = []
    for zoo in ZOOS:
        records += _records(zoo)
    (RESULTS / "table.md").write_text(table(records))


def _todo(options: argparse.Namespace) -> list[Entry]:
    """Return the models that are to be verified."""
    todo = []
    for zoo in options.zoo or [zoo for zoo in ZOOS if is_installed(zoo)]:
        if options.install and not is_installed(zoo):
            install(zoo)
        require(zoo)
        for entry in entries(zoo):
            is_wanted = options.only in f"{entry.zoo}/{entry.group}/{entry.name}"
            if is_wanted and _is_due(entry, options):
                todo.append(entry)
    return todo


def _is_due(entry: Entry, options: argparse.Namespace) -> bool:
    if options.again or is_open(entry.path, options.failed):
        return True
    return options.poor and bool(read(entry.path).poor)


def _records(zoo: str) -> list[Record]:
    """Return the records of a zoo; none if none of its models was ever run."""
    if not (RESULTS / zoo).exists():
        return []
    records = []
    for entry in entries(zoo):
        if entry.path.exists():
            records.append(read(entry.path))
        elif is_installed(zoo):
            record = new_record(entry)
            record.finish("idle", "not run yet")
            records.append(record)
    return records


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=tools.zoo.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--zoo",
        choices=ZOOS,
        action="append",
        help="a zoo to sweep; all that are installed by default",
    )
    parser.add_argument(
        "--install", action="store_true", help="install the packages that are missing first"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="SUBSTRING",
        help="models whose zoo, group or name contains this",
    )
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--again", action="store_true", help="verify models with a record again")
    parser.add_argument(
        "--failed", action="store_true", help="verify models again whose record is a failure"
    )
    parser.add_argument(
        "--poor", action="store_true", help="verify models again that are cut poorly"
    )
    parser.add_argument("--table", action="store_true", help="write the table only")
    return parser


if __name__ == "__main__":
    main()
