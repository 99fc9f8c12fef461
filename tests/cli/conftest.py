"""The hand-written plans that the drawings are tested with."""

from tests.draw.conftest import small

__all__ = ["small"]
