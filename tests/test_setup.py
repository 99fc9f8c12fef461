"""The page of the package: the README without links that lead nowhere from there."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def backend() -> dict[str, Any]:
    pytest.importorskip("setuptools")
    return runpy.run_path(str(ROOT / "tools" / "build_backend.py"))


@pytest.mark.parametrize(
    ("readme", "page"),
    [
        ("see [the guide](a/b.md#c).", "see the guide."),
        ("in [two\nlines](a.md)", "in two\nlines"),
        ("[paper](https://arxiv.org/abs/1) and [below](#here)", None),
        ("![a picture](x.svg)\n\ntext", "text"),
    ],
)
def test_relative_links_are_text(backend: dict[str, Any], readme: str, page: str | None) -> None:
    assert backend["package_page"](readme) == (readme if page is None else page)


@pytest.mark.usefixtures("backend")
def test_the_metadata_holds_the_whole_readme_and_no_relative_link(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("tools", "sffx"):
        (source / folder).mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "tools/build_backend.py", "sffx/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    _run_hook(source, "build_sdist", tmp_path)
    # From the source distribution, which has to hold all that a build needs.
    (packed,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(packed, tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("sffx-*/")
    _run_hook(unpacked, "prepare_metadata_for_build_wheel", tmp_path)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    fields = message_from_string(metadata.read_text(encoding="utf-8"))
    assert fields["Description-Content-Type"] == "text/markdown"
    page = fields.get_payload()
    assert isinstance(page, str)
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert targets
    # A place in the page itself is there on any site.
    assert all(target.startswith(("https://", "#")) for target in targets)
    # Every word of the README is there but for targets and pictures.
    for heading in re.findall(r"^#+ .*$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert heading in page


def _run_hook(source: Path, hook: str, out: Path) -> None:
    """Run a hook of the backend as pip does, in the folder of the project."""
    code = f"import build_backend; build_backend.{hook}({str(out)!r})"
    environment = {**os.environ, "PYTHONPATH": str(source / "tools")}
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True
    )
