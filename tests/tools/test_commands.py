"""Each tool can be imported, and says how it is called."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tools import dev

TOOLS = Path(__file__).parents[2] / "tools"
NO_COMMANDS = ("timing", "costs", "options", "precision", "build_backend")  # others import them
COMMANDS = [path.stem for path in sorted(TOOLS.glob("*.py")) if path.stem not in NO_COMMANDS]


@pytest.mark.parametrize("name", [*COMMANDS, "reproduce.__main__"])
def test_each_tool_can_be_imported_and_says_how_it_is_called(name: str) -> None:
    tool = importlib.import_module(f"tools.{name}")
    module = name.partition(".")[0]
    assert f"tools/{module}.py" in tool.__doc__ or f"-m tools.{module}" in tool.__doc__


def test_dev_names_its_tasks_when_it_is_asked_for_another_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dev.main(["no-such-task"]) == 2
    usage = capsys.readouterr().err
    assert all(f"python3 tools/dev.py {task}" in usage for task in dev.TASKS)
