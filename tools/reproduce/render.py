"""Tables and plots of what was recorded."""

from pathlib import Path


def render(out: Path) -> None:
    pass
