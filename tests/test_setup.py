"""The page of the package: the README without links that lead nowhere from there."""

from __future__ import annotations

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
def setup_py() -> dict[str, Any]:
    pytest.importorskip("setuptools")
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("readme", "page"),
    [
        ("see [the guide](a/b.md#c).", "see the guide."),
        ("in [two\nlines](a.md)", "in two\nlines"),
        ("[paper](https://arxiv.org/abs/1) and [below](#here)", None),
        ("![a picture](x.svg)\n\ntext", "text"),
    ],
)
def test_relative_links_are_text(setup_py: dict[str, Any], readme: str, page: str | None) -> None:
    assert setup_py["package_page"](readme) == (readme if page is None else page)


@pytest.mark.usefixtures("setup_py")
def test_the_metadata_holds_the_whole_readme_and_no_relative_link(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "sffx").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copy(ROOT / "sffx" / "__init__.py", tmp_path / "sffx")
    code = "import setuptools.build_meta as b; print(b.prepare_metadata_for_build_wheel('out'))"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    (metadata,) = tmp_path.glob("out/*.dist-info/METADATA")
    fields = message_from_string(metadata.read_text(encoding="utf-8"))
    assert fields["Description-Content-Type"] == "text/markdown"
    page = fields.get_payload()
    assert isinstance(page, str)
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    # Every word of the README is there but for targets and pictures.
    for heading in re.findall(r"^#+ .*$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert heading in page
