"""The commands' help: it is there at once, and says what is dangerous."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "arguments",
    [
        ["sffx.cli.viz", "--help"],
        ["sffx.cli.viz", "draw", "--help"],
        ["sffx.cli.viz", "plan", "--help"],
        ["sffx.cli.viz", "compare", "--help"],
        ["sffx.cli.export", "--help"],
        ["sffx.cli.export", "weights", "--help"],
        ["sffx.cli.export", "whole", "--help"],
    ],
    ids=" ".join,
)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    without_torch = "import sys; sys.modules['torch'] = None"
    module, *options = arguments
    code = f"{without_torch}; from {module} import main; main({options})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: sffx-" in done.stdout
