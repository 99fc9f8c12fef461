"""What tests/conftest.py leaves out of a run, and what the run says of tests that were skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PASSES = "def test_passes(): pass\n"
NO_GPU = "import pytest\n@pytest.mark.skip(reason='needs a CUDA device')\ndef test_gpu(): pass\n"
NO_BROWSER = "import pytest\npytest.importorskip('no_such_package', reason='there is no browser')\n"


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on a folder with the hooks of tests/conftest.py."""
    plugins = ["-p", "xdist", "-p", "tests.conftest"]
    command = [sys.executable, "-m", "pytest", *plugins, *options]
    # Other plugins take longer to import than these tests to run.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unexpected_skip_fails_the_run_and_is_named(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_some.py").write_text(PASSES)
    (tmp_path / "test_browser.py").write_text(NO_BROWSER)
    result = run_pytest(tmp_path, "-n", workers, "--no-unexpected-skips")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 skipped, NOT EXPECTED: there is no browser" in result.stdout


def test_without_the_option_an_unexpected_skip_is_only_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(PASSES)
    (tmp_path / "test_browser.py").write_text(NO_BROWSER)
    result = run_pytest(tmp_path)
    assert result.returncode == pytest.ExitCode.OK
    assert "1 skipped, NOT EXPECTED: there is no browser" in result.stdout


def test_an_expected_skip_does_not_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(PASSES + NO_GPU)
    result = run_pytest(tmp_path, "--no-unexpected-skips")
    assert result.returncode == pytest.ExitCode.OK
    assert "1 skipped, expected: needs a CUDA device" in result.stdout


CASES = """import pytest
@pytest.mark.sampled(4)
@pytest.mark.parametrize('case', range(7))
def test_long(case): pass
@pytest.mark.parametrize('case', range(5))
def test_short(case): pass
"""


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((), "6 passed, 6 deselected"),
        (("--cases", "most"), "9 passed, 3 deselected"),
        (("--cases", "all"), "12 passed"),
        (("-k", "long"), "7 passed, 5 deselected"),
        (("test_some.py",), "12 passed"),
        (("test_some.py::test_long",), "7 passed"),
    ],
)
def test_a_run_of_folders_takes_some_cases_of_each_test(
    tmp_path: Path, arguments: tuple[str, ...], counts: str
) -> None:
    (tmp_path / "test_some.py").write_text(CASES)
    assert f" {counts} in" in run_pytest(tmp_path, *arguments).stdout
