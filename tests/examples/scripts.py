"""Run an example as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent


def run(script: str, *arguments: object, folder: Path, fails: bool = False) -> str:
    """Run an example from a folder; return what it printed, or the error where it is to fail."""
    with start(script, *arguments, folder=folder) as process:
        output, error = process.communicate()
    assert bool(process.returncode) == fails, error
    return error if fails else output


def start(script: str, *arguments: object, folder: Path) -> subprocess.Popen[str]:
    """Start an example with one thread, in a folder."""
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
