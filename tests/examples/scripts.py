"""Run an example as a user does: its file, with arguments, in a folder.

It runs in the process of the tests, which has imported torch already. One that is to be killed gets
a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent


def run(script: str, *arguments: object, folder: Path, fails: bool = False) -> str:
    """Run an example from a folder; return what it printed, or the error where it is to fail."""
    main = partial(runpy.run_path, str(EXAMPLES / script), run_name="__main__")
    return run_main(main, *arguments, folder=folder, fails=fails)


def run_main(
    main: Callable[[], object], *arguments: object, folder: Path, fails: bool = False
) -> str:
    """Run the main function of an example as `run` runs a file."""
    error = ""
    with _as_a_command(*arguments, folder=folder) as printed:
        try:
            main()
        except SystemExit as exit:
            error = str(exit.code or "")
    assert bool(error) == fails, error
    return error if fails else printed.getvalue()


@contextlib.contextmanager
def _as_a_command(*arguments: object, folder: Path) -> Iterator[io.StringIO]:
    """Set what a process of its own would have, and yield what is printed."""
    threads = torch.get_num_threads()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
        torch.random.fork_rng(),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["example", *map(str, arguments)])
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try:
            yield printed
        finally:
            torch.set_num_threads(threads)


def start(script: str, *arguments: object, folder: Path) -> subprocess.Popen[str]:
    """Start an example with one thread, in a folder and in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
