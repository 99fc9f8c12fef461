"""Packages of models that are no dependency of this project, fetched on demand."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from tools.zoo.entries import ZOOS, package

FOLDER = Path(__file__).parent.parent.parent / "build" / "zoo"


class NotInstalled(Exception):
    """A zoo is asked for whose package is not there. The message says how to get it."""


def add_folders() -> None:
    """Let Python find what was installed on demand, behind everything else."""
    for zoo in ZOOS:
        folder = str(FOLDER / zoo)
        if folder not in sys.path:
            sys.path.append(folder)


def is_installed(zoo: str) -> bool:
    try:
        importlib.metadata.version(zoo)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(zoo: str) -> None:
    """Install a package of models into a folder of its own.

    What it needs is listed in its module, without torch and numpy, which are there. So pip does not
    look for the dependencies, and no other version of torch comes with them.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    target = ["--no-deps", "--target", str(FOLDER / zoo)]
    subprocess.run([*command, *target, *package(zoo).REQUIRES], check=True)


def require(zoo: str) -> None:
    """Raise an error if the package of a zoo is not installed.

    Raises:
        NotInstalled: with the commands that install it.
    """
    if is_installed(zoo):
        return
    wanted = " ".join(package(zoo).REQUIRES)
    raise NotInstalled(
        f"the package {zoo!r} is not installed. Hint: python -m tools.zoo --zoo {zoo} --install "
        f"puts it into build/zoo; or pip install --no-deps {wanted}"
    )
