"""Build the package by setuptools. The package page is the README without relative links.

A relative link leads into the repository, and nowhere from the page of a package. Everything else
about the package is in pyproject.toml.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.command.sdist import sdist

# As pyproject.toml names them. A build runs in the folder of the project.
README = Path("README.md")
PAGE = Path("build/package_page.md")
# The target of a link into the repository: neither an address nor a place in the page itself.
INTO_REPOSITORY = r"\((?!https?://|#)[^)]*\)"
PICTURE = re.compile(rf"!\[[^\]]*\]{INTO_REPOSITORY}\n*")
LINK = re.compile(rf"\[([^\]]*)\]{INTO_REPOSITORY}")


def package_page(readme: str) -> str:
    """Return a README whose relative links are plain text, and whose relative pictures are gone."""
    return LINK.sub(r"\1", PICTURE.sub("", readme))


def _with_page(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook of a build that first writes the page."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(package_page(README.read_text(encoding="utf-8")), encoding="utf-8")
        return hook(*args, **kwargs)

    return run


get_requires_for_build_editable = _with_page(build_meta.get_requires_for_build_editable)
get_requires_for_build_sdist = _with_page(build_meta.get_requires_for_build_sdist)
get_requires_for_build_wheel = _with_page(build_meta.get_requires_for_build_wheel)
prepare_metadata_for_build_editable = _with_page(build_meta.prepare_metadata_for_build_editable)
prepare_metadata_for_build_wheel = _with_page(build_meta.prepare_metadata_for_build_wheel)
build_editable = _with_page(build_meta.build_editable)
build_sdist = _with_page(build_meta.build_sdist)
build_wheel = _with_page(build_meta.build_wheel)


class _SdistWithBackend(sdist):
    """Puts this file into a source distribution, which needs it to be built."""

    def add_defaults(self) -> None:
        super().add_defaults()
        self.filelist.extend([str(README), "tools/build_backend.py"])


def _add_backend_to_sdists() -> None:
    # setuptools looks the class of a command up in its module.
    import setuptools.command.sdist as module

    module.sdist = _SdistWithBackend


_add_backend_to_sdists()
