"""Run an example as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: object, folder: Path, fails: bool = False) -> str:
    """Run an example from a folder with one thread and return what it printed, where it is to fail the error."""
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert bool(done.returncode) == fails, done.stderr
    return done.stderr if fails else done.stdout
