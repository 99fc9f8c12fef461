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
    return _output(start(script, *arguments, folder=folder), fails)


def run_module(module: str, *arguments: object) -> str:
    """Run a module from the root of the repository; return what it printed."""
    return _output(_start_python("-m", module, *arguments, folder=ROOT), fails=False)


def start(script: str, *arguments: object, folder: Path) -> subprocess.Popen[str]:
    """Start an example with one thread, in a folder."""
    return _start_python(EXAMPLES / script, *arguments, folder=folder)


def _start_python(*arguments: object, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _output(started: subprocess.Popen[str], fails: bool) -> str:
    with started as process:
        output, error = process.communicate()
    assert bool(process.returncode) == fails, error
    return error if fails else output
