"""Set up a virtual environment beside this repository's files and run a task in it.

    python3 tools/dev.py demo    # train, compare, export and draw: examples/digits.py
    python3 tools/dev.py test    # ruff and the tests, of which one runs mypy
    python3 tools/dev.py docs    # the API reference, as HTML in build/docs

Needs Python 3.10 or later and a network, nothing else. The environment is `.venv`. It is brought
up to date when pyproject.toml changes. Further arguments go to the last command of the task.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

# The modules of the API reference: the public names, then modules with names of their own.
DOCUMENTED = [
    "sffx",
    "sffx.lightning",
    "sffx.memory.count",
    "sffx.draw.render",
    "sffx.draw.compare",
    "sffx.plots.results",
    "sffx.plots.history",
    "sffx.plots.scores",
]


class Task(NamedTuple):
    """The extra of pyproject.toml that a task needs, and its commands, all run by Python."""

    extra: str
    commands: list[list[str]]


TASKS = {
    "demo": Task("demo", [["-m", "examples.digits"]]),
    "test": Task(
        "dev",
        [
            ["-m", "ruff", "check"],
            ["-m", "ruff", "format", "--check"],
            # Each process takes half of the tests; one that is done takes from the other's rest.
            ["-m", "pytest", "-n", "2", "--dist", "worksteal"],
        ],
    ),
    "docs": Task(
        "docs",
        [["-m", "pdoc", "--docformat", "google", "--output-directory", "build/docs", *DOCUMENTED]],
    ),
}


def install(extra: str) -> None:
    """Install the project with an extra, unless this was done since pyproject.toml last changed."""
    stamp = ENVIRONMENT / f"installed-{extra}"
    wanted = (ROOT / "pyproject.toml").read_bytes()
    if stamp.exists() and stamp.read_bytes() == wanted:
        return
    if not PYTHON.exists():
        print(f"making {ENVIRONMENT} …", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
    if not has_pip():  # an earlier run was interrupted while it made the environment
        run("-m", "ensurepip")
    print(f"installing sffx[{extra}]; PyTorch is large, this may take minutes …", flush=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    run("-m", "pip", "install", *quiet, "--editable", f".[{extra}]")
    stamp.write_bytes(wanted)


def has_pip() -> bool:
    asked = subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False)
    return asked.returncode == 0


def run(*arguments: str) -> None:
    """Run the environment's Python in the root of the repository.

    Raises:
        subprocess.CalledProcessError: the command fails.
    """
    subprocess.run([PYTHON, *arguments], cwd=ROOT, check=True)


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - an older Python reads this file too
        print(f"sffx needs Python 3.10 or later, not {sys.version.split()[0]}", file=sys.stderr)
        return 2
    if not arguments or arguments[0] not in TASKS:
        print(__doc__, file=sys.stderr)
        return 2
    task = TASKS[arguments[0]]
    further = arguments[1:]
    *first_commands, last_command = task.commands
    try:
        install(task.extra)
        for command in first_commands:
            run(*command)
        run(*last_command, *further)
    except subprocess.CalledProcessError as failure:
        print(f"failed: {' '.join(map(str, failure.cmd))}", file=sys.stderr)
        return failure.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
