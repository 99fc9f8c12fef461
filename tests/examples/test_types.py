"""The package, the tools and the code of the pages pass a type checker, also when installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sffx
from tests.examples.scripts import ROOT
from tests.examples.test_guides import PAGES, blocks_of

PROGRAM = """
import torch
import sffx

net = sffx.transform(torch.nn.Linear(2, 2), norm="none")
reveal_type(net)
reveal_type(net.plan)
reveal_type(net.readout)
reveal_type(net.origin.model)
net.readout.mode = "ensemble"
net.readout.mode = "ensembel"
sffx.transform(torch.nn.Linear(2, 2), norm="lair")
sffx.export_onnx(net, "net.onnx", readout="cumulativ")
sffx.__version__.split(".")
"""


def code_of(page: Path) -> str:
    """Return the Python of a page, each line at its place."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for block in blocks_of(text):
        if block.language == "python":
            own = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(own)] = own
    return "\n".join(lines) + "\n"


def mypy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run mypy by the options of pyproject.toml, with one cache for all runs."""
    own = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *own, *arguments],
        cwd=cwd,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def package() -> subprocess.CompletedProcess[str]:
    """Return what mypy says of the package and the tools.

    It runs beside other tests, since it takes half a minute of one core to read torch.
    """
    return mypy(cwd=ROOT)


def test_package_and_tools_have_no_type_errors(package: subprocess.CompletedProcess[str]) -> None:
    assert package.returncode == 0, package.stdout + package.stderr


@pytest.fixture(scope="module")
def checked(
    package: subprocess.CompletedProcess[str], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Return what mypy says of all pages and of the program, line by line.

    One run for all, after that of the package, which leaves its cache.
    """
    folder = tmp_path_factory.mktemp("pages")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    for page in PAGES:
        name = page.stem.lower().replace("-", "_")
        (folder / f"{name}.py").write_text(code_of(page), encoding="utf-8")
    files = sorted(file.name for file in folder.glob("*.py"))
    run = mypy(*files, cwd=folder)
    assert not run.stderr
    return run.stdout.splitlines()


def test_the_code_of_the_pages_has_no_type_errors(checked: list[str]) -> None:
    assert "checked" in checked[-1]
    assert not [line for line in checked[:-1] if "program.py" not in line]


def test_the_types_that_a_user_sees(checked: list[str]) -> None:
    of_program = [line for line in checked if "program.py" in line]
    revealed = [
        line.rpartition('"')[0].rpartition(".")[2] for line in of_program if "note:" in line
    ]
    assert revealed[:4] == ["CutModel", "BlockPlan", "Readout", "Module"]
    wrong = [line for line in of_program if "error:" in line]
    assert [int(line.rpartition("program.py:")[2].split(":")[0]) for line in wrong] == [11, 12, 13]


def test_an_editable_install_is_a_path(tmp_path):
    """A type checker follows a path, but not the import hook that setuptools may install."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "sffx", "tools"):
        (project / name).symlink_to(ROOT / name)
    code = (
        "import os, sys\n"
        "sys.path.insert(0, 'tools')\n"
        "import build_backend\n"
        "print(build_backend.build_editable(sys.argv[1]))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=project,
        check=True,
        capture_output=True,
        env={**os.environ, "SETUPTOOLS_USE_DISTUTILS": "local"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        paths = [name for name in names if name.endswith(".pth")]
        assert archive.read(paths[0]).decode().strip() == str(project)
    assert not [name for name in names if "finder" in name]
    assert wheel.name.startswith(f"sffx-{sffx.__version__}-")
