"""The gallery shows what its command draws, and is small enough for a repository."""

from __future__ import annotations

import re
import runpy

from tests.examples.scripts import EXAMPLES

PICTURES = EXAMPLES / "pictures"


def test_the_gallery_shows_all_that_its_command_draws() -> None:
    tool = runpy.run_path(str(EXAMPLES.parent / "tools" / "pictures.py"))
    page = (PICTURES / "README.md").read_text(encoding="utf-8")
    assert page == tool["gallery"]()
    shown = set(re.findall(r'<img src="([^"]+)"', page))
    assert shown == {path.name for path in PICTURES.iterdir()} - {"README.md"}
    assert len(shown) == len(tool["GALLERY"])
    assert sum((PICTURES / name).stat().st_size for name in shown) < 3e6


def test_the_readme_shows_a_picture_that_is_there() -> None:
    page = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\((examples/pictures/[^)]+)\)", page)
    assert linked
    assert all((EXAMPLES.parent / path).is_file() for path in linked)
