"""Which tests run, and in which order. The end of a run names each skip and its reason."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
from hypothesis import settings

# They hold whole programs: single tests of 5 to 20 s.
LONG_FOLDERS = ("examples", "tools")

# How many cases of a test a quick run takes: nine minutes on two cores. All cases take about twice
# as long.
FEW = 3

# A part of a skip's reason, and why such a skip is right.
EXPECTED_SKIPS = {"a CUDA device": "the machines that run these tests have no GPU"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-unexpected-skips",
        action="store_true",
        help="fail if a test is skipped for a reason that tests/conftest.py does not list",
    )
    parser.addoption(
        "--cases",
        choices=["few", "most", "all"],
        default="few",
        help=f"which cases of a test a run of whole folders takes: few, {FEW} of each test; most, "
        "all but for the tests marked `sampled(n)`; or all. Files and tests named by themselves "
        "run on all",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set what makes a run fast, before torch is imported."""
    config.addinivalue_line(
        "markers",
        "sampled(n): a long test, of whose cases a run takes n unless it is to take all",
    )
    # Python's own threshold takes 7 % of the time of a run.
    gc.set_threshold(50_000, 10, 10)
    # The processes of a run fill all cores. A second thread of each only waits for a core, which
    # takes as much time as several tests. Processes that a test starts have the same setting.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A run tries the same examples as the last one, so that it fails for what was changed only.
    # Some files try more and others with SFFX_EXAMPLES.
    settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    settings.load_profile("repeatable")


def pytest_runtest_setup() -> None:
    """Take back what an import has made slow for the tests after it."""
    # Lightning sets it. Then torch loads the driver of a GPU anew for each operation on fake
    # tensors, which takes a tenth of the time of a cut.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    # For each export, torch parses the sources of 500 functions, and asks for all its operators
    # several times. The first takes as long as a small model, the second a tenth of an export.
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    _keep_result(getattr(registration, "ONNXRegistry", None), "from_torchlib", staticmethod)
    _keep_result(sys.modules.get("torch._export.utils"), "_materialize_cpp_cia_ops")


def _keep_result(owner: Any, name: str, kind: Callable[..., Any] = lambda found: found) -> None:
    """Let a function of a module or a class keep its results, if torch has it and it does not."""
    found = getattr(owner, name, None)
    if found is not None and not hasattr(found, "cache_info"):
        setattr(owner, name, kind(cache(found)))


def pytest_collection_finish() -> None:
    """Leave what all imports have made out of further collections, each of which takes 0.3 s."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases of long tests, and begin with the folders of long tests.

    At the end, one worker would wait for the other.
    """
    chosen = config.getoption("--cases")
    if chosen != "all" and not _is_named(config):
        left_out = _left_out(items, limit=FEW if chosen == "few" else None)
        config.hook.pytest_deselected(items=left_out)
        dropped = set(left_out)
        items[:] = [item for item in items if item not in dropped]
    items.sort(key=lambda item: item.path.parent.name not in LONG_FOLDERS)


def _is_named(config: pytest.Config) -> bool:
    """Return whether the run is of files or tests that were named, not of whole folders."""
    files = any("::" in each or each.endswith(".py") for each in config.args)
    return files or bool(config.option.keyword)


def _left_out(items: Iterable[pytest.Item], limit: int | None) -> list[pytest.Item]:
    """Return the cases that a run leaves out. The same cases give the same answer.

    Args:
        items: all cases of all tests, in order.
        limit: how many cases of a test are taken at most, None for all or as many as its mark
            says.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = []
    for of_test in cases.values():
        mark = of_test[0].get_closest_marker("sampled")
        wanted = min(len(of_test) if mark is None else mark.args[0], limit or len(of_test))
        taken = _spread(wanted, over=len(of_test))
        left_out += [item for i, item in enumerate(of_test) if i not in taken]
    return left_out


def _spread(wanted: int, over: int) -> set[int]:
    """Return the indices of so many of a list's items, at equal distances."""
    step = max(over / wanted, 1)
    return {int(i * step) for i in range(wanted)}


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the reason of a skip, without the prefix that pytest puts before it."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def is_expected(reason: str) -> bool:
    return any(part in reason for part in EXPECTED_SKIPS)


def count_unexpected(reasons: Iterable[str]) -> int:
    """Return how many skips have a reason that `EXPECTED_SKIPS` does not list."""
    return sum(not is_expected(reason) for reason in reasons)


def skip_reasons(config: pytest.Config) -> list[str]:
    """Return the reason of each skip so far, in the process that prints the summary."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [reason_of(report) for report in reporter.stats.get("skipped", [])]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    counts = Counter(skip_reasons(config))
    if not counts:
        return
    terminalreporter.section("skipped")
    for reason, count in counts.items():
        kind = "expected" if is_expected(reason) else "NOT EXPECTED"
        terminalreporter.write_line(f"{count} skipped, {kind}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for an unexpected skip, where the option asks for it."""
    is_xdist_worker = hasattr(session.config, "workerinput")
    if is_xdist_worker or not session.config.getoption("--no-unexpected-skips"):
        return
    if session.exitstatus == pytest.ExitCode.OK and count_unexpected(skip_reasons(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
