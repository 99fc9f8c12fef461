"""Set up a virtual environment beside this repository's files and run a task in it.

    python3 tools/dev.py demo    # the main job: examples/digits.py
    python3 tools/dev.py test    # ruff, mypy and the tests

Needs only Python 3.10 or later and a network. The environment is `.venv`; what is in it is brought up to date when pyproject.toml changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TASKS = {
    "demo": ("demo", [["examples/digits.py"]]),
    "test": (
        "dev",
        [
            ["-m", "ruff", "check"],
            ["-m", "ruff", "format", "--check"],
            ["-m", "mypy"],
            ["-m", "pytest", "-n", "2", "--dist", "loadfile"],
        ],
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
    if subprocess.run(
        [PYTHON, "-m", "pip", "--version"], capture_output=True, check=False
    ).returncode:
        subprocess.run([PYTHON, "-m", "ensurepip"], check=True)  # its making was interrupted
    print(
        f"installing sffx[{extra}]; PyTorch is large, so this may take some minutes …", flush=True
    )
    subprocess.run(
        [
            PYTHON,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--editable",
            f".[{extra}]",
        ],
        cwd=ROOT,
        check=True,
    )
    stamp.write_bytes(wanted)


def main(arguments: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this is the file that an older Python gets to see
        print(f"sffx needs Python 3.10 or later, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    if not arguments or arguments[0] not in TASKS:
        print(__doc__, file=sys.stderr)
        return 2
    extra, commands = TASKS[arguments[0]]
    try:
        install(extra)
        for i, command in enumerate(commands):
            rest = arguments[1:] if i == len(commands) - 1 else []
            subprocess.run([PYTHON, *command, *rest], cwd=ROOT, check=True)
    except subprocess.CalledProcessError as failure:
        print(f"failed: {' '.join(map(str, failure.cmd))}", file=sys.stderr)
        return failure.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
