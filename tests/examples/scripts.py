"""Run an example as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent


def run(script: str, *arguments: object, folder: Path, fails: bool = False) -> str:
    """Run an example from a folder with one thread.

    Returns:
        What it printed; its errors instead, if it is to fail.
    """
    return run_python(EXAMPLES / script, *arguments, folder=folder, fails=fails)


def run_python(*arguments: object, folder: Path, fails: bool = False) -> str:
    """Run Python from a folder with one thread.

    Returns:
        What it printed; its errors instead, if it is to fail.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.returncode) == fails, done.stderr
    return done.stderr if fails else done.stdout
