"""Build the package. Its page shows the README without links to files of the repository.

Such links are relative, and lead nowhere from the page of a package. Everything else about the
package is in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")
# The target of a link into the repository: neither an address nor a place in the page itself.
INTO_REPOSITORY = r"\((?!https?://|#)[^)]*\)"
PICTURE = re.compile(rf"!\[[^\]]*\]{INTO_REPOSITORY}\n*")
LINK = re.compile(rf"\[([^\]]*)\]{INTO_REPOSITORY}")


def package_page(readme: str) -> str:
    """Return a README with the text of its relative links in their place, and no such pictures."""
    return LINK.sub(r"\1", PICTURE.sub("", readme))


if __name__ == "__main__":
    setup(
        long_description=package_page(README.read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
